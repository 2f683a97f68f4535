"""A script for PyHessian, of the calls that its example makes in their order: one batch or several, DataParallel, eval mode, a plot."""

import argparse
import json

import numpy as np
import torch
import torch.nn as nn
from density_plot import get_esd_plot
from pyhessian import hessian

parser = argparse.ArgumentParser()
parser.add_argument("--mini-hessian-batch-size", type=int, default=12)
parser.add_argument("--hessian-batch-size", type=int, default=12)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--cuda", action="store_false")
parser.add_argument("--tol", type=float, default=1e-3)
parser.add_argument("--max-iter", type=int, default=100)
parser.add_argument("--no-density", action="store_true")  # release 0.1 calls torch.eig there, which is gone
args = parser.parse_args()

torch.manual_seed(args.seed)
inputs = torch.randn(36, 2, 6, 6)
labels = torch.arange(36) % 3
data = torch.utils.data.TensorDataset(inputs, labels)
train_loader = torch.utils.data.DataLoader(data, batch_size=args.mini_hessian_batch_size)
batch_num = args.hessian_batch_size // args.mini_hessian_batch_size
if batch_num == 1:
    hessian_dataloader = next(iter(train_loader))
else:
    hessian_dataloader = []
    for i, (inputs, labels) in enumerate(train_loader):
        hessian_dataloader.append((inputs, labels))
        if i == batch_num - 1:
            break

model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))
if args.cuda:
    model = model.cuda()
model = torch.nn.DataParallel(model)
criterion = nn.CrossEntropyLoss()

model.eval()
if batch_num == 1:
    hessian_comp = hessian(model, criterion, data=hessian_dataloader, cuda=args.cuda)
else:
    hessian_comp = hessian(model, criterion, dataloader=hessian_dataloader, cuda=args.cuda)

top_eigenvalues, top_eigenvectors = hessian_comp.eigenvalues(maxIter=args.max_iter, tol=args.tol, top_n=2)
trace = hessian_comp.trace()
print("Top Eigenvalues:", top_eigenvalues)
print("Trace:", np.mean(trace))
if not args.no_density:
    density_eigen, density_weight = hessian_comp.density()
    get_esd_plot(density_eigen, density_weight)

shapes = [[list(t.shape) for t in v] for v in top_eigenvectors]
print(json.dumps({"eigenvalues": top_eigenvalues, "trace": trace, "shapes": shapes}))
