"""Writes *_pb2.py and *_pb2.pyi beside each proto file; test/unit/modelexpress checks that they are current."""

import base64
import re
import sys
import tempfile
import textwrap
from importlib import resources
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

FOLDER = Path(__file__).resolve().parent.parent / "python/ramet/srt/modelexpress/proto"

MODULE = '''"""Owns the classes of {proto}, in a descriptor pool of its own. Written by `make proto`; do not edit."""

from ramet.srt.modelexpress.proto.private_pool import export_file

ENCODED_DESCRIPTOR = """
{encoded}
"""
DESCRIPTOR = export_file(ENCODED_DESCRIPTOR, globals())
'''


def compile_proto(path: Path) -> tuple[bytes, str]:
    """A proto file's serialized FileDescriptorProto and its type stub (pyi).

    Raises:
        ValueError: if protoc does not accept the file; it has said why on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder) / "descriptors"
        arguments = ["protoc", f"-I{path.parent}", f"-I{resources.files('grpc_tools') / '_proto'}"]
        arguments += [f"--descriptor_set_out={descriptors}", f"--pyi_out={folder}", path.name]
        if protoc.main(arguments) != 0:
            raise ValueError(f"protoc does not accept {path}")
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file
        stub = (Path(folder) / f"{path.stem}_pb2.pyi").read_text()
        stub = re.sub(r"_Union\[([\w.]+), str\]", r"_Union[\1, int, str]", stub)  # messages take an enum's number too
        return files[0].SerializeToString(deterministic=True), stub


def main() -> int:
    for path in sorted(FOLDER.glob("*.proto")):
        descriptor, stub = compile_proto(path)
        encoded = "\n".join(textwrap.wrap(base64.b64encode(descriptor).decode(), 100))
        (FOLDER / f"{path.stem}_pb2.py").write_text(MODULE.format(proto=path.name, encoded=encoded))
        (FOLDER / f"{path.stem}_pb2.pyi").write_text(stub)
    return 0


if __name__ == "__main__":
    sys.exit(main())
