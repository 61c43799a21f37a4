# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""compare_logs.py host.csv device.csv: two logs of train_gpt for the same model, data and seed, on two executors. Fails unless the
device has taken as many steps, begins with the same losses (first steps: a thousandth, which another order of sums does not
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
    if len(host) != len(device):
        sys.exit(f"{len(host)} steps on the host, {len(device)} on the device")
    wrong = [f"step {i + 1}: {a} on the host, {b} on the device" for i, (a, b) in enumerate(zip(host, device)) if i < 10 and not apart(a, b) < 0.001]
    last = max(1, len(host) // 4)
    ends = [sum(losses[-last:]) / last for losses in (host, device)]
    if not apart(*ends) < 0.03:
        wrong.append(f"the last {last} steps: {ends[0]} on the host, {ends[1]} on the device")
    if wrong:
        sys.exit("\n".join(wrong))
    middle = lambda values: sorted(values)[len(values) // 2]
    print(f"{len(host)} steps, loss {host[0]:.4f} to {ends[0]:.4f} on the host and {ends[1]:.4f} on the device; "
          f"{middle(host_speed):.0f} and {middle(device_speed):.0f} tokens/s")


main()
