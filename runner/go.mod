module cifixer.dev/runner

go 1.27
