# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""compare_logs.py host.csv device.csv [names]: two logs of train_gpt for the same model, data and seed, on two executors, or of
one rank and of several, which names may say. Fails unless the second has taken as many steps, begins with the same losses (first steps: a thousandth, which another order of sums does not
reach) and ends with the same loss (mean of the last quarter: three percent, since routings near a tie part in time)."""
import csv
import sys


def read(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        sys.exit(f"{path} has no steps")
    return [float(row["loss"]) for row in rows], [float(row["tokens_per_second"]) for row in rows]


def apart(a, b):
    return abs(a - b) / max(abs(a), abs(b))


def main():
    (host, host_speed), (device, device_speed) = read(sys.argv[1]), read(sys.argv[2])
    here, there = sys.argv[3:5] or ("on the host", "on the device")
    if len(host) != len(device):
        sys.exit(f"{len(host)} steps {here}, {len(device)} {there}")
    wrong = [f"step {i + 1}: {a} {here}, {b} {there}" for i, (a, b) in enumerate(zip(host, device)) if i < 10 and not apart(a, b) < 0.001]
    last = max(1, len(host) // 4)
    ends = [sum(losses[-last:]) / last for losses in (host, device)]
    if not apart(*ends) < 0.03:
        wrong.append(f"the last {last} steps: {ends[0]} {here}, {ends[1]} {there}")
    if wrong:
        sys.exit("\n".join(wrong))
    middle = lambda values: sorted(values)[len(values) // 2]
    print(f"{len(host)} steps, loss {host[0]:.4f} to {ends[0]:.4f} {here} and {ends[1]:.4f} {there}; "
          f"{middle(host_speed):.0f} and {middle(device_speed):.0f} tokens/s")


main()
