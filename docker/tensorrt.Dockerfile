# JetPack 7 (Orin and Thor) and data-centre GPUs: NVIDIA's image of TensorRT, for x86-64 and aarch64. It brings TensorRT
# 10.16.1, CUDA 13.2 and Python 3.12; RELEASE=26.08-py3 brings TensorRT 11.2.1.
#   docker build -f docker/tensorrt.Dockerfile -t mmvision:tensorrt10 .
#   docker build -f docker/tensorrt.Dockerfile -t mmvision:tensorrt11 --build-arg RELEASE=26.08-py3 .
ARG RELEASE=26.05-py3
FROM nvcr.io/nvidia/tensorrt:${RELEASE}
# cmake and g++ are for mmvision build-plugins. Versions are those of the image's own release of Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY LICENSE NOTICE README.md constraints.txt pyproject.toml ./
COPY mmvision_export mmvision_export
COPY plugins plugins
# TensorRT's Python module is the image's. PIP_CONSTRAINT is the image's own list of versions, for its other packages.
RUN python3 -m venv --system-site-packages /opt/mmvision \
    && PIP_CONSTRAINT='' /opt/mmvision/bin/pip install --no-cache-dir --constraint constraints.txt '.[cpu,engine,plugins,video]'
ENV PATH=/opt/mmvision/bin:$PATH
# The user's number is that of the owner of the model directory: an engine loads only from a folder of its user.
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" mmvision && install -d -o mmvision /work
ENV HOME=/home/mmvision
USER ${UID}
WORKDIR /work
ENTRYPOINT ["mmvision"]
CMD ["doctor"]
