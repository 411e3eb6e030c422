"""Compiles common/wire/*.proto into the package at build time; everything else about the build is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).resolve().parent / "src"


def compile_protos() -> None:
    """Write *_pb2.py and *_pb2.pyi beside each .proto. Paths go through src/kvfs so that the generated imports name the installed package."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(SOURCE)) for path in (SOURCE / "kvfs" / "common" / "wire").glob("*.proto"))
    well_known = str(Path(grpc_tools.__file__).parent / "_proto")
    arguments = ["protoc", f"-I{SOURCE}", f"-I{well_known}", f"--python_out={SOURCE}", f"--pyi_out={SOURCE}"]
    if protoc.main([*arguments, *(str(SOURCE / name) for name in protos)]) != 0:
        raise SystemExit("protoc failed: see the messages above")


class BuildWithProtos(build_py):
    def run(self) -> None:
        compile_protos()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithProtos})
