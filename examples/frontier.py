"""Several budgets side by side: accuracy and speed of each, then the fastest model that is accurate enough.

python examples/frontier.py [--quick]
"""

import argparse

import torch

import fxlrd
from fxlrd.app import fashion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer images and no timing: tests the script")
quick = parser.parse_args().quick

calibration = fashion.calibration()[: 40 if quick else 1024]
images, labels = (tensor[: 60 if quick else 2000] for tensor in fashion.test())


def accuracy(network):
    with torch.no_grad():
        return (network(images).argmax(1) == labels).double().mean().item()


frontier = fxlrd.frontier(
    fashion.trained().to(memory_format=torch.channels_last),
    calibration[: 8 if quick else 32],
    calibration=calibration.split(8 if quick else 32),
    budgets=["params=0.6", "params=0.4"] if quick else [0.9, 0.8, 0.7, 0.6],
    evaluate=accuracy,
    measure=not quick,
    progress=True,
)
print(frontier)
point = frontier.fastest(accuracy=frontier.original["accuracy"] - 0.05)
fxlrd.save(point.result(), "fastest")
print(f"written: fastest/, the model within {point.budget}")
