package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

const (
	maxPathLength = 4096
	transferDir   = "transfer"
	commandsDir   = "commands"
)

func underWorkspace(workspace, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(workspace, path)
}

// place is a path that was checked: a name below one of the allowed roots, opened through
// os.Root, so that a symlink which appears after the check cannot lead out either.
type place struct {
	root *os.Root
	name string // relative to root, "." for the root itself
	path string // absolute, symlinks resolved as far as was asked; to be shown, not to be opened
}

func (p *place) close() { p.root.Close() }

func (p *place) isRoot() bool { return p.name == "." }

// resolvedRoots makes the roots comparable with resolved paths.
func resolvedRoots(roots []string) []string {
	var resolved []string
	for _, root := range roots {
		clean := filepath.Clean(root)
		resolved = append(resolved, clean)
		if real, err := filepath.EvalSymlinks(clean); err == nil && real != clean {
			resolved = append(resolved, real)
		}
	}
	return resolved
}

// locate checks a path for a verb that acts on what a final symlink points to.
func (s *server) locate(path text) (*place, error) { return s.resolve(string(path), true) }

// locateEntry is for verbs that act on the name itself, like lstat and remove.
func (s *server) locateEntry(path text) (*place, error) { return s.resolve(string(path), false) }

func (s *server) resolve(path string, followLast bool) (*place, error) {
	if path == "" || hasNUL(path) || len(path) > maxPathLength {
		return nil, faultf(codeInvalid, "path %q: 1 to %d bytes without NUL", shorten(path, 100), maxPathLength)
	}
	clean := underWorkspace(s.options.workspace, path)
	if s.rootOf(clean) == "" {
		return nil, s.forbidden(path)
	}
	real, err := realPath(clean, followLast)
	if err != nil {
		return nil, fileFault(err, path)
	}
	root := s.rootOf(real)
	if root == "" {
		return nil, s.forbidden(path)
	}
	name, err := filepath.Rel(root, real)
	if err != nil {
		return nil, s.forbidden(path)
	}
	opened, err := os.OpenRoot(root)
	if err != nil {
		return nil, fileFault(err, path)
	}
	return &place{root: opened, name: name, path: s.shown(real)}, nil
}

// shown is a resolved path as its users know it: a root may itself be a link, and where that leads is no business of theirs.
func (s *server) shown(real string) string {
	for _, root := range s.options.roots() {
		clean := filepath.Clean(root)
		if target, err := filepath.EvalSymlinks(clean); err == nil && target != clean && within(real, target) {
			return filepath.Join(clean, strings.TrimPrefix(real, target))
		}
	}
	return real
}

func (s *server) forbidden(path string) error {
	return faultf(codePathForbidden, "%q is not within %s", shorten(path, 200), strings.Join(s.roots, ", "))
}

// rootOf gives the longest allowed root that holds path, or "".
func (s *server) rootOf(path string) string {
	best := ""
	for _, root := range s.roots {
		if within(path, root) && len(root) > len(best) {
			best = root
		}
	}
	return best
}

func within(path, root string) bool {
	return path == root || root == "/" || strings.HasPrefix(path, root+"/")
}

// realPath resolves symlinks in as much of the path as exists; the rest stays as it is.
func realPath(path string, followLast bool) (string, error) {
	if !followLast && path != "/" {
		parent, err := realPath(filepath.Dir(path), true)
		return filepath.Join(parent, filepath.Base(path)), err
	}
	real, err := filepath.EvalSymlinks(path)
	if err == nil {
		return real, nil
	}
	if !errors.Is(err, os.ErrNotExist) || path == "/" {
		return "", err
	}
	if _, err := os.Lstat(path); err == nil { // a dangling symlink: nobody knows where it will lead
		return "", faultf(codeNotFound, "%q is a symbolic link to nothing", path)
	}
	parent, err := realPath(filepath.Dir(path), true)
	return filepath.Join(parent, filepath.Base(path)), err
}

// isEscape recognizes os.Root's refusal, for which the library has no exported error.
func isEscape(err error) bool {
	return err != nil && strings.Contains(err.Error(), "path escapes from parent")
}
