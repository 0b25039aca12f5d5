"""A stand-in for an NDIF server: a process with the weights and without interp that runs nnsight's requests.

Started as `python remote_server.py FOLDER`; for each line "REQUEST RESPONSE" on its input it runs the request in the
first file and writes what it saved, as NDIF does, to the second. What the request's pickle names is printed.
"""

import sys
from pathlib import Path

import torch


def serve(folder):
    sys.modules["interp"] = None  # as on a server: importing it is an error
    import io

    import nnsight
    import zstandard
    from nnsight.intervention.serialization import CustomCloudUnpickler
    from nnsight.schema.config import CONFIG
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import tracer as tracing

    torch.set_num_threads(1)
    named = set()

    class Unpickler(CustomCloudUnpickler):
        def find_class(self, module, name):
            named.add(module)
            return super().find_class(module, name)

    model = nnsight.TransformersModel(folder, task="text-generation", dispatch=True)
    print("ready", flush=True)
    for line in sys.stdin:
        request, response = map(Path, line.split())
        named.clear()
        compress = CONFIG.API.COMPRESS
        tracer = RequestModel.deserialize(
            request.read_bytes(), model._remoteable_persistent_objects(), compress, Unpickler
        )
        tracing.inc()
        try:
            tracer.execute(tracer.info.code)
            saved = {k: v for k, v in tracer.info.frame.f_locals.items() if id(v) in tracing._saves()}
        finally:
            tracing.dec()
        out = io.BytesIO()
        torch.save(saved, out)
        content = out.getvalue()
        response.write_bytes(zstandard.ZstdCompressor().compress(content) if compress else content)
        print(*sorted(named), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
