# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""keep_report.py nvcc arguments...: runs the compiler, and keeps what it says in the file of the object with .ptxas behind."""
import subprocess
import sys

command = sys.argv[1:]
said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
if "-o" in command and said.returncode == 0:
    with open(command[command.index("-o") + 1] + ".ptxas", "w") as file:
        file.write(said.stdout)
else:
    sys.stdout.write(said.stdout)
sys.exit(said.returncode)
