# For GPUs: 26.09 has torch 2.14 and TransformerEngine 2.19 (torch 2.11 to 2.15 works).
#
#   docker build -t moevit .
#   docker run -it --rm --gpus=all --shm-size=16G moevit
#
# The second line trains the default recipe on the bundled images. To train on ImageNet and keep the
# checkpoints (ckpts must be writable for user 1001):
#
#   docker run -it --rm --gpus=all --shm-size=16G -v /data/imagenet:/data/imagenet:ro \
#       -v "$PWD/ckpts":/home/moevit/ckpts moevit torchrun --nproc-per-node=gpu train.py \
#       --config-name vit_base_patch16_224 dataset.train.root=/data/imagenet
FROM nvcr.io/nvidia/pytorch:26.09-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --create-home --uid 1001 moevit
WORKDIR /home/moevit

# These packages stay as the container built them (kept.txt). Everything else is installed as pinned
# here, so the container's own constraints are lifted (an empty PIP_CONSTRAINT).
COPY requirements.txt /tmp/
RUN grep -Ev '^(torch|torchvision|numpy)==' /tmp/requirements.txt > /tmp/added.txt \
    && pip list --format=freeze \
        | grep -E '^(torch|torchvision|numpy|triton|transformer[-_]engine[^=]*)==' > /tmp/kept.txt \
    && PIP_CONSTRAINT='' pip install --no-cache-dir -r /tmp/added.txt -c /tmp/kept.txt \
    && rm /tmp/*.txt

USER 1001
COPY --chown=1001 . .
CMD ["torchrun", "--nproc-per-node=gpu", "train.py"]
