# A CPU, or an RTX PC: TensorRT-RTX comes from PyPI and needs the driver alone.
#   docker build -f docker/python.Dockerfile -t mmvision:cpu .
#   docker build -f docker/python.Dockerfile -t mmvision:rtx --build-arg EXTRAS=cpu,rtx,video .
FROM python:3.12.12-slim-bookworm AS wheel
WORKDIR /source
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY mmvision_export mmvision_export
COPY plugins plugins
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12.12-slim-bookworm
ARG EXTRAS=cpu,video
COPY constraints.txt /opt/
COPY --from=wheel /wheel /opt/wheel
RUN python -m venv /opt/mmvision \
    && wheel="$(echo /opt/wheel/*.whl)" \
    && /opt/mmvision/bin/pip install --no-cache-dir --constraint /opt/constraints.txt "${wheel}[${EXTRAS}]"
ENV PATH=/opt/mmvision/bin:$PATH
# The user's number is that of the owner of the model directory: an engine loads only from a folder of its user.
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" mmvision && install -d -o mmvision /work
ENV HOME=/home/mmvision
USER ${UID}
WORKDIR /work
ENTRYPOINT ["mmvision"]
CMD ["doctor"]
