# Jetson Orin with JetPack 6: the image brings TensorRT 10.3, CUDA 12.6 and Python 3.10. Build it on the Jetson.
#   docker build -f docker/jetpack6.Dockerfile -t mmvision:jetpack6 .
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
# cmake and g++ are for mmvision build-plugins. Versions are those of the image's own release of Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY LICENSE NOTICE README.md constraints-jetpack6.txt pyproject.toml ./
COPY mmvision_export mmvision_export
COPY plugins plugins
# TensorRT's Python module is the system's. It is not imported here: it needs libraries that only a running
# container gets, from the Jetson.
RUN python3 -m venv --system-site-packages /opt/mmvision \
    && /opt/mmvision/bin/pip install --no-cache-dir --constraint constraints-jetpack6.txt '.[cpu,engine,plugins,video]'
ENV PATH=/opt/mmvision/bin:$PATH
# The user's number is that of the owner of the model directory: an engine loads only from a folder of its user.
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" --groups video mmvision && install -d -o mmvision /work
ENV HOME=/home/mmvision
USER ${UID}
WORKDIR /work
ENTRYPOINT ["mmvision"]
CMD ["doctor"]
