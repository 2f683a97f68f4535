"""A script for hessian-eigenthings, of the calls that its example makes: an operator, eigenvalues, trace and density."""

import json

import torch
from hessian_eigenthings.algorithms import lanczos, spectral_density, trace
from hessian_eigenthings.loss_fns import supervised_loss
from hessian_eigenthings.operators import HessianOperator
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.float64)
x = torch.randn(64, 6, dtype=torch.float64)
y = x @ torch.randn(6, 1, dtype=torch.float64) + 0.1 * torch.randn(64, 1, dtype=torch.float64)
dataloader = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

operator = HessianOperator(model=model, dataloader=dataloader, loss_fn=supervised_loss(nn.functional.mse_loss))
pairs = lanczos(operator, k=3, max_iter=40, tol=1e-7, seed=0)
traced = trace(operator, num_matvecs=60, method="hutch++", seed=0)
density = spectral_density(operator, num_runs=4, lanczos_steps=20, seed=0)

print(f"{operator.size} parameters, {pairs.iterations} iterations")
result = {
    "eigenvalues": [v.item() for v, _ in zip(pairs.eigenvalues, pairs.residuals, strict=True)],
    "converged": pairs.converged.tolist(),
    "vectors": list(pairs.eigenvectors.shape),
    "trace": traced.estimate,
    "samples": len(traced.samples),
    "integral": float(torch.trapz(density.density, density.grid)),
    "runs": list(density.raw_eigenvalues.shape),
    "points": density.grid.numel(),
}
print(json.dumps(result))
