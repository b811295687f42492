# %% [markdown]
# # Lesson 004: what autograd computes
#
# Autograd records operations on tensors with `requires_grad`, and `backward()` applies the chain
# rule to each of them. (Lesson 001 explains what a gradient is, and what `check` prints.)

# %%
import numpy as np
import torch
from torch import Tensor, nn

from derivatives import per_sample_jacobian
from lightning_gd import LinearRegression, PointsData
from teaching import check, conclude, loss_rounding, train, train_layer

# %% [markdown]
# ## The gradient of a vector. The mistake: it was not zeroed
#
# y = x + 2 has three entries, each with a slope for each entry of x: a matrix J, the **Jacobian**.
# `backward(v)` computes vᵀJ, the slopes of v₁y₁ + v₂y₂ + v₃y₃. For v = (1, 1, 1) they are all 1.
# `backward` **adds** to `.grad`. The notebook went on with z = mean(2y²) and a second `backward`,
# and printed 4.7465, 4.9461, 4.6984: the gradient 4 (x + 2)/3 of z, plus the ones left over. The
# true one is 1 less. `torch.autograd.grad` returns it and leaves `.grad` alone. (x was printed with
# 4 digits and is known to 5e-5, hence 2y² to 4 y · 5e-5 < 6e-4, and the gradient to 7e-5.)
# The same with Σ 3w, whose gradient is 3: three times `backward` leave 3, 6, 9; zeroed, 3, 3, 3.

# %%
x = torch.tensor([0.8099, 0.9596, 0.7738], requires_grad=True)
y = x + 2
y.backward(torch.ones(3), retain_graph=True)
check("vector_grad_ones x_grad", x.grad, [1.0, 1.0, 1.0])
z = 2 * y**2
(true,) = torch.autograd.grad(z.mean(), x, retain_graph=True)
z.mean().backward()
check("accumulated_grad_bug y", y, "2.8099 2.9596 2.7738")
check("accumulated_grad_bug z_vec", z, "15.7907 17.5183 15.3877", 6e-4)
check("accumulated_grad_bug z", z.mean(), "16.2323", 6e-4)
check("accumulated_grad_bug printed", x.grad, "4.7465 4.9461 4.6984", 7e-5)
check("accumulated_grad_bug true", true, "3.7465 3.9461 3.6984", 7e-5)

w, zeroed = torch.ones(4, requires_grad=True), torch.arange(1.0, 5.0, requires_grad=True)
for total in (3.0, 6.0, 9.0):
    output = (3 * w).sum()
    output.backward()
    check("grad_accumulation output", output, 12.0)
    check("grad_accumulation grad", w.grad, [total] * 4)
    zeroed.grad = None
    (3 * zeroed).sum().backward()
    check("grad_zeroed grad", zeroed.grad, [3.0] * 4)

# %% [markdown]
# ## A Jacobian per sample
#
# B maps (x, y, z) to (x³ − y², y² + z², z³ − x²). The samples x = y = z = 0 … 9 have ten Jacobians
# of 3 × 3. `per_sample_jacobian` makes one backward pass per output, summed over the samples;
# `functional.jacobian` finds all 10 · 3 · 10 · 3 slopes, most of them 0. They agree exactly.


# %%
def B(point: Tensor) -> Tensor:
    """Map [..., 3] to [..., 3]."""
    x, y, z = point.unbind(-1)
    return torch.stack([x**3 - y**2, y**2 + z**2, z**3 - x**2], dim=-1)


samples = torch.arange(10.0)[:, None].expand(10, 3)
printed = [[n**3 - n**2, 2 * n**2, n**3 - n**2] for n in range(10)]  # 0 0 0, 0 2 0, 4 8 4, …
check("jacobian B", B(samples), printed)
full = torch.as_tensor(torch.autograd.functional.jacobian(B, samples))  # [10, 3, 10, 3]
for way, jacobian in {
    "per_sample_jacobian": per_sample_jacobian(B, samples),
    "functional.jacobian": torch.stack([full[n, :, n] for n in range(10)]),
}.items():
    check(f"jacobian shape, {way}", jacobian.shape, [10, 3, 3])
    formula = [[[3 * n**2, -2 * n, 0], [0, 2 * n, 2 * n], [-2 * n, 0, 3 * n**2]] for n in range(10)]
    check(f"jacobian of all, {way}", jacobian, formula)

# %% [markdown]
# ## Three ways not to be recorded
#
# `requires_grad_(False)` on a tensor, as `LinearRegression(bias=False)` does its bias; `detach()`
# for its values without the history; `no_grad()` for all that is computed inside.

# %%
x, bias = torch.rand(3, requires_grad=True), LinearRegression(bias=False).bias
with torch.no_grad():
    inside = x + 2
recorded = [t.requires_grad for t in (x + 2, inside, x.detach(), x.requires_grad_(False), bias)]
check("detach_no_grad_random recorded", recorded, [True, False, False, False, False])

# %% [markdown]
# ## The line y = 2x again. The mistake: the w of another cell
#
# First the chain rule on one sample: x = 1, y = 2, w = 1.5 has the loss 0.25 and the slope −1. Then
# the NumPy loop of lesson 001, which trains `W` and prints `w`: ten times the 1.500 of the sample.
# By `nn.Linear` with a bias all 1000 updates come back from the random start that the digits
# determine. 100 updates at λ = 0.001 multiply the steep part of the loss by 0.0344, the flat part
# by 0.9419: (1 − 0.001 · 16.7)²⁰⁰ and (1 − 0.001 · 0.299)²⁰⁰.

# %%
w = torch.tensor(1.5, requires_grad=True)
loss = (w * 1 - 2) ** 2
loss.backward()
check("chain_rule_scalar loss", loss, 0.25)
check("chain_rule_scalar grad", w.grad, -1.0)

X, W, stale, weights, losses = np.array([1, 2, 3, 4], np.float32), np.float32(0), [], [], []
for _ in range(10):
    losses.append(np.mean((W * X - 2 * X) ** 2))
    W = W - np.float32(0.01) * np.dot(2 * X, W * X - 2 * X).mean()
    stale.append(w.item())
    weights.append(W)
check("numpy_sum_gradient_stale_print printed", stale, "1.500 " * 10)
printed = "1.200 1.680 1.872 1.949 1.980 1.992 1.997 1.999 1.999 2.000"
check("numpy_sum_gradient_stale_print true w", weights, printed)
printed = """30.00000000 4.79999924 0.76800019 0.12288000 0.01966083
             0.00314570 0.00050332 0.00008053 0.00001288 0.00000206"""
check("numpy_sum_gradient_stale_print loss", losses, printed, loss_rounding(losses))
check("numpy_sum_gradient_stale_print f(5) before, after", [0.0, 5 * W], "0.000 9.999")

points, rows, five = PointsData(), torch.tensor(X)[:, None], torch.tensor([[5.0]])
W0, B0 = 0.50949061, -0.57441056
for mode in ("explicit", "autograd"):
    run = train(LinearRegression(bias=False, lr=0.01, gradient=mode), points, 10)
    printed = "0.300 0.555 0.772 0.956 1.113 1.246 1.359 1.455 1.537 1.606"
    check(f"torch_optim_sgd_10 w, {mode}", run.weights[1:], printed)
    check(f"torch_autograd_10 w, {mode}", run.weights[1::2], "0.300 0.772 1.113 1.359 1.537")
    printed = """30.00000000 21.67499924 15.66018772 11.31448650 8.17471695
                 5.90623236 4.26725292 3.08308983 2.22753215 1.60939169"""
    rounding = loss_rounding(run.losses)
    check(f"torch_optim_sgd_10 loss, {mode}", run.losses, printed, rounding)
    check(f"torch_autograd_10 loss, {mode}", run.losses[::2], printed.split()[::2], rounding[::2])

ours, layer = LinearRegression(weight=[W0], intercept=B0, lr=0.001), nn.Linear(1, 1)
layer.load_state_dict({"weight": torch.tensor([[W0]]), "bias": torch.tensor([B0])})
check("nn_linear_1000 before_f5", layer(five), "1.973")
for way, run in {
    "nn.Linear": train_layer(layer, rows, 2 * rows, 0.001, 1000),
    "ours": train(ours, points, 1000),
}.items():
    printed = "0.535 1.744 1.968 2.009 2.016 2.017 2.017 2.017 2.016 2.016"
    check(f"nn_linear_1000 w, {way}", run.weights[1::100], printed)
    printed = """21.27290535 0.73334575 0.02578374 0.00137958 0.00051042
                 0.00045357 0.00042627 0.00040146 0.00037816 0.00035621"""
    losses = run.losses[::100]
    check(f"nn_linear_1000 loss, {way}", losses, printed, loss_rounding(losses))
    rates = losses[[1, 9]] / losses[[0, 8]]
    check(f"nn_linear_1000_rate fast, slow, {way}", rates, "0.0344 0.9419", 1e-4)
check("nn_linear_1000 after_f5", layer(five), "10.031")
conclude("004")
