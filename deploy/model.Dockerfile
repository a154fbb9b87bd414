# An image of one release alone, for STORAGE_URI=oci://REGISTRY/bloom:1. First fill the folder that is built from; upload
# says the release's name:
#     make upload MODEL_NAME=bloom STORAGE_URI=file:///tmp/bloom
#     docker build -f deploy/model.Dockerfile -t REGISTRY/bloom:1 /tmp/bloom/RELEASE
# KServe runs it beside the server and needs a shell in it.
FROM busybox:stable
COPY --chown=1000 . /models
