# One image for every part of a stack: worker, beat, flower, and the command line.
#
#   docker build -t cifixer-exec:0.1.0 .
#   docker build --build-arg PACKAGES="git make" …    # programs of Debian that sandboxes of the *local* backend shall see
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# What changes least comes first, so that a change of our own code installs nothing anew. All of it is pinned by hash; the build's
# tools, with the Go toolchain of the runner among them, stay in this stage.
COPY .lock/build.txt .lock/image.txt .lock/
RUN python3 -m venv /build \
 && /build/bin/pip install --quiet --require-hashes -r .lock/build.txt \
 && python3 -m venv --without-pip /opt/cifixer \
 && /build/bin/pip --python /opt/cifixer/bin/python install --quiet --require-hashes -r .lock/image.txt
COPY pyproject.toml README.md LICENSE celeryconfig.py ./
COPY runner runner
COPY cifixer_exec cifixer_exec
RUN /build/bin/pip wheel --quiet --no-build-isolation --no-deps -w /wheels . \
 && /build/bin/pip --python /opt/cifixer/bin/python install --quiet --no-deps /wheels/*.whl \
 && cp "$(/opt/cifixer/bin/python -c 'from cifixer_exec.backends.runner import runner_path; print(runner_path())')" /runner

# Only the runner, for the init container of Kubernetes sandboxes: docker build --target runner -t cifixer-exec-runner:0.1.0 .
FROM scratch AS runner
COPY --from=build /runner /runner
USER 10001:10001
ENTRYPOINT ["/runner"]

FROM ${PYTHON_IMAGE}
ARG PACKAGES=""
RUN if [ -n "$PACKAGES" ]; then \
      apt-get update -qq && apt-get install -y -qq --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; \
    fi \
 && groupadd --gid 10001 cifixer \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cifixer
COPY --from=build /opt/cifixer /opt/cifixer
# The same image does as CIFIXER_KUBERNETES_RUNNER_IMAGE, too.
COPY --from=build /runner /runner
ENV PATH=/opt/cifixer/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="cifixer-exec" \
      org.opencontainers.image.description="Durable sandboxes for untrusted commands, behind a Celery queue" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
USER 10001:10001
WORKDIR /tmp
# A worker drains on SIGTERM: give `docker stop` more time than CIFIXER_DRAIN_S. Health checks are the stack's (docker-compose.yml).
STOPSIGNAL SIGTERM
ENTRYPOINT ["cifixer-exec"]
CMD ["worker"]
