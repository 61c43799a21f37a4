# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""keep_report.py nvcc arguments...: runs the compiler, and keeps what it says in the file of the object with .ptxas behind. Where the
first argument is --keep-ptx, the PTX of all architectures is kept in that with .ptx behind."""
import pathlib
import subprocess
import sys
import tempfile

command = sys.argv[1:]
keeps = command[:1] == ["--keep-ptx"]
command = command[keeps:]
target = command[command.index("-o") + 1] if "-o" in command else None
with tempfile.TemporaryDirectory() as folder:
    # nvcc names what it keeps after the source, so each run has a folder of its own.
    kept = ["--keep", "--keep-dir", folder] if keeps and target else []
    said = subprocess.run(command + kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if target and said.returncode == 0:
        pathlib.Path(target + ".ptxas").write_text(said.stdout)
        if kept:
            texts = [file.read_text() for file in sorted(pathlib.Path(folder).glob("*.ptx"))]
            pathlib.Path(target + ".ptx").write_text("\n".join(texts))
    else:
        sys.stdout.write(said.stdout)
sys.exit(said.returncode)
