# The service in a container. For a CPU, take torch from the index of CPU builds that PyTorch's installation page names:
#   docker build --build-arg TORCH_INDEX=URL -t ctclip .
# Without the argument, pip's default torch with CUDA is installed:
#   docker build -t ctclip:cuda . && docker run --gpus all ...
# Then, with a model folder on this machine:
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v ./model:/model:ro ctclip
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY configs configs
COPY preprocessing preprocessing
COPY ctclip ctclip
RUN python -m venv /opt/ctclip \
    && /opt/ctclip/bin/pip install torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    && /opt/ctclip/bin/pip install --constraint constraints.txt ".[serve,index,dicom]"

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/ctclip /opt/ctclip
RUN useradd --system --uid 10001 --no-create-home ctclip
USER 10001
ENV PATH=/opt/ctclip/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TMPDIR=/tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["ctclip"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0"]
