"""Compress the trained network that comes with fxlrd to half its parameters, and print what that costs.

python examples/first_compression.py [--quick]
"""

import argparse

import torch

import fxlrd
from fxlrd.app import fashion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer images and no timing: tests the script")
quick = parser.parse_args().quick

model = fashion.trained().to(memory_format=torch.channels_last)
calibration = fashion.calibration()[: 40 if quick else 1024]
images, labels = (tensor[: 60 if quick else 2000] for tensor in fashion.test())


def accuracy(network):
    with torch.no_grad():
        return (network(images).argmax(1) == labels).double().mean().item()


x = calibration[: 8 if quick else 32]
result = fxlrd.compress(
    model,
    x,
    budget=fxlrd.Budget(params=0.5),
    calibration=calibration.split(8 if quick else 32),
    measure=not quick,
    progress=True,
)
print(result.report.to_table())
print(f"accuracy {accuracy(model):.1%} → {accuracy(result.model):.1%}")
fxlrd.save(result, "clothes-half")
result.report.to_html("clothes-half.html")
print("written: clothes-half/, a checkpoint, and clothes-half.html, the report")
