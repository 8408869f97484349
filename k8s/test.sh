#!/bin/sh
# make test-kubernetes: the tests of the Kubernetes backend on the best cluster that can be had.
#   CIFIXER_TEST_KUBECONFIG             a cluster of yours; then also
#   CIFIXER_TEST_KUBERNETES_NAMESPACE   with the service account ci-fixer-sandbox (default: ci-fixer-sandboxes)
#   CIFIXER_TEST_KUBERNETES_IMAGE       of sandboxes: sh, python3, git, procps (default: the project's)
#   CIFIXER_TEST_KUBERNETES_RUNNER_IMAGE  with the runner at /runner (default: it is uploaded)
set -eu
cd "$(dirname "$0")/.."
export CIFIXER_TEST_REQUIRE=kubernetes
cluster=cifixer-test

if [ -z "${CIFIXER_TEST_KUBECONFIG:-}" ] && command -v kind >/dev/null && command -v kubectl >/dev/null && docker info >/dev/null 2>&1; then
    mkdir -p build
    kubeconfig=$PWD/build/kind.kubeconfig
    trap 'kind delete cluster --name "$cluster" --kubeconfig "$kubeconfig"' EXIT
    trap 'exit 130' INT TERM
    if kind create cluster --name "$cluster" --kubeconfig "$kubeconfig" --wait 120s \
        && docker build --quiet --target runner -t cifixer-exec-runner:test . \
        && kind load docker-image cifixer-exec-runner:test --name "$cluster" \
        && kubectl --kubeconfig "$kubeconfig" apply -f k8s/rbac/k8s.yaml; then
        export CIFIXER_TEST_KUBECONFIG="$kubeconfig" CIFIXER_TEST_KUBERNETES_RUNNER_IMAGE=cifixer-exec-runner:test
    else
        echo "no kind cluster could be made: the tests go on with the stand-in" >&2
    fi
fi
if [ -z "${CIFIXER_TEST_KUBECONFIG:-}" ]; then
    echo "on the stand-in of tests/support/kubernetes: no CIFIXER_TEST_KUBECONFIG, and no kind cluster" >&2
fi
pytest tests/contract tests/chaos tests/integration -k kubernetes
