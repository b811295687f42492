# %% [markdown]
# # Lesson 001: a line by NumPy, by autograd, by nn.Linear
#
# Four points lie on the line y = 2x. The model predicts ŷ = w x, does not know the 2, and starts
# from w = 0. Its loss is the mean over the N = 4 points of the squared errors, L = 1/N Σ (ŷ − y)².

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from lightning_gd import LinearRegression, PointsData, check_gradients
from lightning_gd.curvature import Curvature
from teaching import check, conclude, loss_rounding, train, train_layer

x = np.array([1, 2, 3, 4], dtype=np.float32)
y = 2 * x
points = PointsData(x.tolist(), y.tolist())

# %% [markdown]
# ## What is the gradient?
#
# The slope of the loss: by how much L changes per change of w. It can be measured, by a small step
# of w up and down. It can be calculated, by the chain rule: each error r = w x − y changes by x per
# unit of w, and r² by 2r per unit of r, hence dL/dw = 2/N Σ x r. At w = 0 it is −30: a larger w
# makes the loss smaller. Gradient descent steps against the slope, w ← w − λ dL/dw, where λ is the
# learning rate. With several weights the gradient is the list of their slopes.

# %%
h = 0.001
measured = (np.mean((h * x - y) ** 2) - np.mean((-h * x - y) ** 2)) / (2 * h)
print(f"the gradient at w = 0: measured {measured:.2f}, calculated {np.mean(2 * x * -y):.2f}")

# %% [markdown]
# ## Where is it computed by hand, and where by autograd?
#
# By hand: in `LinearRegression.gradients` (lightning_gd/models/linear.py), the same formula in two
# lines. By autograd: torch records how `model.loss` was computed; `backward()` applies the chain
# rule to each operation and leaves the result in `weight.grad`. It is the same number. (A torch
# tensor is an array.) `check_gradients` compares the formula with measured slopes, for any model.
# `check(name, ours, expected)` compares our numbers with those that the notebook prints, or that
# a formula gives. A ✓ means that they are the same in every printed digit.

# %%
rows, targets = torch.tensor(x)[:, None], torch.tensor(y)
model = LinearRegression(bias=False)
check("mean_gradient_closed_form by hand", model.gradients(rows, targets)["weight"], -30.0)
model.loss(rows, targets).backward()
check("mean_gradient_closed_form by autograd", model.weight.grad, -30.0)
print(*check_gradients(model, rows, targets).lines(), sep="\n")

# %% [markdown]
# ## The notebook's loop, by NumPy
#
# It prints w after each update and the loss before it; at the start and at the end f(5), which
# should become 10. The first number, 1.200, is w after one update: 0 − 0.01 · (−120). So its
# gradient is −120, and not −30. (`loss_rounding` is how far float32 numbers may move a loss.)

# %%
w, weights, losses = np.float32(0), [], []
for _ in range(10):
    r = w * x - y
    losses.append(np.mean(r**2))
    gradient = np.dot(2 * x, r).mean()
    w = w - np.float32(0.01) * gradient
    weights.append(w)
printed = "1.200 1.680 1.872 1.949 1.980 1.992 1.997 1.999 1.999 2.000"
check("numpy_sum_gradient w", weights, printed)
printed = """30.00000000 4.79999924 0.76800019 0.12288000 0.01966083
             0.00314574 0.00050331 0.00008053 0.00001288 0.00000206"""
check("numpy_sum_gradient loss", losses, printed, loss_rounding(losses))
check("numpy_sum_gradient f(5) before, after", [0.0, 5 * w], "0.000 9.999")

# %% [markdown]
# ## The mistake: a sum for a mean
#
# With the same λ = 0.01 torch is at w = 0.300 after one update, and needs 57 to come as near to 2
# as the loop above comes in 10. Why did the notebook's own version converge faster?
#
# `np.dot(2 * x, r)` has already summed over the points, and the `.mean()` of that one number is the
# number itself. So the loop follows the **sum** of the slopes, N = 4 times the gradient of the loss
# that it prints. This has the effect of a learning rate of 0.04 in place of 0.01. An update
# multiplies the distance to w = 2 by 1 − λ · 15, where 15 = 2/N Σ x² is the curvature of the loss:
# by 0.85 for λ = 0.01, by 0.4 for λ = 0.04. Whether Lightning's Trainer, which `train` calls, takes
# the gradient from the formula (`explicit`) or from `autograd` makes no difference: with λ = 0.04
# both take the path of the NumPy loop. The sum diverges above λ = 1/30, the mean above 2/15.

# %%
k = np.arange(1, 11)
for mode in ("explicit", "autograd"):
    model = LinearRegression(bias=False, lr=0.01, gradient=mode)
    run = train(model, points, 100)
    printed = "0.300 1.665 1.934 1.987 1.997 1.999 2.000 2.000 2.000 2.000"
    check(f"torch_autograd_100 w, {mode}", run.weights[1::10], printed)
    printed = """30.00000000 1.16278565 0.04506890 0.00174685 0.00006770
                 0.00000262 0.00000010 0.00000000 0.00000000 0.00000000"""
    rounding = loss_rounding(run.losses[::10])
    check(f"torch_autograd_100 loss, {mode}", run.losses[::10], printed, rounding)
    check(f"torch_autograd_100 f(5), {mode}", model(torch.tensor([[5.0]])), "10.000")
    for lr, q, law in ((0.04, 0.4, "numpy_sum_gradient"), (0.01, 0.85, "mean_gradient")):
        model = LinearRegression(bias=False, lr=lr, gradient=mode).double()
        exact = train(model, points, 10)
        check(f"{law}_closed_form w, {mode}", exact.weights[k], 2 * (1 - q**k), 1e-14)
        check(f"{law}_closed_form loss, {mode}", exact.losses, 30 * q ** (2 * k - 2), 1e-12)
rate = Curvature(torch.tensor([[15.0]])).max_lr()
check("numpy_sum_gradient_closed_form lr_max", [rate / 4, rate], "0.0333333 0.1333333")

plt.semilogy(losses, "o-", color="#D55E00", label="the loop by NumPy: the sum, λ = 0.01")
plt.semilogy(run.losses[:40], color="#0072B2", label="autograd and formula: the mean, λ = 0.01")
plt.gca().set(xlabel="update", ylabel="loss")
plt.legend()
plt.show()

# %% [markdown]
# ## By nn.Linear, with a bias. The mistake: a cell that had run before
#
# `nn.Linear(1, 1)` is ŷ = w x + b from a random start. The notebook printed f(5) = 5.113 before the
# training, yet a first loss of 0.00016451, where f(5) is near 10. The cell had been run ten times
# before, for 100 updates each. From w = 0.9534 and b = 0.3462 every digit comes back, after the
# first 1000 updates. (`train_layer` is the loop that every torch program has: predict, loss,
# `backward`, step.) The end is slow: along the flat direction of the two weights the curvature is
# 0.2994, and ten updates multiply the loss by (1 − 0.01 · 0.2994)²⁰ = 0.9418, whatever the start.

# %%
layer, five = nn.Linear(1, 1), torch.tensor([[5.0]])
layer.load_state_dict({"weight": torch.tensor([[0.9534]]), "bias": torch.tensor([0.3462])})
check("nn_linear_rerun_cell34 before_f5", layer(five), "5.113")
ours = LinearRegression(weight=[0.9534], intercept=0.3462, lr=0.01)
for way, run in {
    "nn.Linear": train_layer(layer, rows, targets[:, None], 0.01, 1100),
    "ours": train(ours, points, 1100),
}.items():
    printed = "1.989 1.990 1.990 1.990 1.991 1.991 1.991 1.991 1.992 1.992"
    check(f"nn_linear_rerun_cell34 w, {way}", run.weights[1001::10], printed)
    printed = """0.00016451 0.00015493 0.00014591 0.00013742 0.00012942
                 0.00012189 0.00011479 0.00010811 0.00010182 0.00009589"""
    losses = run.losses[1000::10]
    check(f"nn_linear_rerun_cell34 loss, {way}", losses, printed, loss_rounding(losses))
    check(f"nn_linear_rate measured, {way}", losses[9] / losses[8], "0.9418")
check("nn_linear_rerun_cell34 after_f5", layer(five), "9.984")

hessian = points.moments_of("train").hessian()
curvature = Curvature(hessian)
check("nn_linear_rate hessian", hessian, [15.0, 5.0, 5.0, 2.0])
check("nn_linear_rate eig", curvature.eigenvalues, "0.2993903 16.7006097")
check("nn_linear_rate cond", curvature.condition_number, "55.7820731")
check("nn_linear_rate lr_max", curvature.max_lr(), "0.1197561")
check("nn_linear_rate per 10 epochs", (1 - 0.01 * curvature.smallest) ** 20, "0.9417948")
conclude("001")
