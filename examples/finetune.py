"""Cut the channels between layers, then train the result for an epoch with the original as the teacher.

python examples/finetune.py [--quick]

Fashion-MNIST's training set is not shipped: half of the test images serve for training, the other half to measure.
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import fxlrd
from fxlrd.app import fashion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer images and no timing: tests the script")
quick = parser.parse_args().quick

model = fashion.trained()
calibration = fashion.calibration()[: 40 if quick else 1024]
images, labels = (tensor[: 60 if quick else 2000] for tensor in fashion.test())
half = len(images) // 2
loader = DataLoader(TensorDataset(images[:half], labels[:half]), batch_size=50, shuffle=True)


def accuracy(network):
    with torch.no_grad():
        return (network(images[half:]).argmax(1) == labels[half:]).double().mean().item()


passes = "calibrate{effects=128,holdout=true},merge,refit,recalibrate"
result = fxlrd.compress(
    model,
    calibration[: 8 if quick else 32],
    pipeline=passes,
    calibration=calibration.split(8 if quick else 32),
    measure=not quick,
)
before = accuracy(result.model)
fxlrd.finetune(result.model, loader, epochs=1, teacher=model, evaluate=accuracy)
print(f"original {accuracy(model):.1%}, compressed {before:.1%}, fine-tuned {accuracy(result.model):.1%}")
