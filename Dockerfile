# The broker's image: Python, brokerd with its compiled routing loop, the libraries these load, and nothing else.
#
#   podman build --format docker -t brokerd .        (or docker build -t brokerd .)
#
# podman's default format has no HEALTHCHECK.
# docs/operations.md, "Container", tells how to run it.

FROM docker.io/library/python:3.13-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# No versions: Debian keeps only its latest, and nothing of this stage stays but what the compiler makes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY client client
COPY brokerd brokerd
COPY .ci/requirements-run.txt .ci/requirements-build.txt .ci/
# What the locks say, every file by its hash. For an index that does not have their versions, --build-arg UNLOCKED=1
# asks for what pyproject.toml allows.
ARG UNLOCKED=
RUN if [ -n "$UNLOCKED" ]; then \
        python -m pip wheel --no-cache-dir --wheel-dir /wheels .; \
    else \
        python -m pip install --no-cache-dir --require-hashes --requirement .ci/requirements-build.txt \
        && python -m pip wheel --no-cache-dir --wheel-dir /wheels --require-hashes \
            --requirement .ci/requirements-run.txt \
        && python -m pip wheel --no-cache-dir --wheel-dir /wheels --no-deps --no-build-isolation .; \
    fi

# The loop is optional to an install and not to this image: the build ends here if it is not there.
RUN python -m venv --without-pip /opt/brokerd \
    && python -m pip --python /opt/brokerd/bin/python install --no-cache-dir --no-compile --no-index --find-links /wheels brokerd \
    && /opt/brokerd/bin/python -I -c 'from brokerd.core import _routing_c'

COPY .ci/image_root.sh /usr/local/bin/
RUN image_root.sh /opt/brokerd /image 10001


FROM scratch

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="brokerd" \
      org.opencontainers.image.description="A message broker whose client every Python already has" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="docker.io/library/python:3.13-slim-bookworm"

COPY --from=build /image /

# The runtime mounts files there for this container alone, so their modes need not keep other users out.
ENV PATH=/opt/brokerd/bin:/usr/local/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BROKERD_SEALED_DIRECTORY=/run/secrets \
    STATE_DIRECTORY=/var/lib/brokerd

# A number, so that Kubernetes can see that it is not root. Any other one works too.
USER 10001:10001
WORKDIR /etc/brokerd
VOLUME ["/etc/brokerd", "/run/brokerd", "/var/lib/brokerd"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=6s --start-period=30s --retries=3 CMD ["brokerd", "health"]
ENTRYPOINT ["brokerd"]
