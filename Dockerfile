# nbdq as a container: docker build -t nbdq . && docker run --rm -p 10809:10809 -v /srv/images:/images:ro nbdq -r disk.qcow2
# Whoever reaches the port reads the disk; docs/tls.md keeps others out.

FROM python:3.11-slim AS build
COPY . /source
RUN python -m venv /opt/nbdq \
    && /opt/nbdq/bin/pip install --no-cache-dir --quiet /source \
    && /opt/nbdq/bin/pip uninstall --quiet --yes setuptools pip

FROM python:3.11-slim
LABEL org.opencontainers.image.title="nbdq" \
      org.opencontainers.image.description="An NBD server for QCOW2 backing chains" \
      org.opencontainers.image.licenses="MIT"
RUN python -m pip uninstall --quiet --yes --root-user-action=ignore setuptools wheel pip
COPY --from=build /opt/nbdq /opt/nbdq
ENV PATH=/opt/nbdq/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# Images must be readable by this user, and writable unless they are served with -r.
USER 65532:65532
WORKDIR /images
VOLUME /images
EXPOSE 10809
STOPSIGNAL SIGTERM
# The port is published by whoever runs the container, or not.
ENTRYPOINT ["nbdq", "serve", "--bind", "0.0.0.0"]
