# %% [markdown]
# # Lesson 000: one sample, one weight, one step too long
#
# A model with one weight predicts ŷ = w x. It sees one sample, x = 5 with the target y = 0.92, and
# starts from w = 0.15. How wrong it is, the **loss**, is L = (ŷ − y)². Gradient descent changes w
# against the slope of the loss: w ← w − λ dL/dw, with the **learning rate** λ = 0.1.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from lightning_gd import LinearRegression, PointsData, check_gradients
from lightning_gd.curvature import Curvature
from teaching import check, conclude, train

x, y, start, lr = 5.0, 0.92, 0.15, 0.1

# %% [markdown]
# ## By hand, in Python
#
# A change of w moves ŷ, and ŷ moves L. The **chain rule** multiplies the two slopes:
#
#     dL/dŷ = 2 (ŷ − y)        dŷ/dw = x        dL/dw = 2 (ŷ − y) x
#
# `check` compares our number with the one after it, which the notebook printed, and prints ✓ where
# every digit is the same. Python computes in float64, which has 16 digits.

# %%
prediction = start * x
check("manual_forward_loss y_pred", prediction, 0.75)
check("manual_forward_loss loss", (prediction - y) ** 2, 0.028900000000000012)

outer, inner = 2 * (prediction - y), x
check("manual_chain_rule_step dl_dy", outer, -0.3400000000000001)
check("manual_chain_rule_step dy_dw", inner, 5.0)
check("manual_chain_rule_step dl_dw", outer * inner, -1.7000000000000004)

weight = start - lr * outer * inner
check("manual_chain_rule_step new_weight", weight, 0.32000000000000006)
check("manual_chain_rule_step y_pred_after", weight * x, 1.6000000000000003)
check("manual_chain_rule_step loss_after", (weight * x - y) ** 2, 0.46240000000000037)

# %% [markdown]
# ## By torch
#
# `nn.Linear` is the same model. A torch tensor with `requires_grad` remembers how it was used:
# `loss.backward()` walks back through the chain rule and leaves dL/dw in `weight.grad`. This is
# **autograd**. Torch computes in float32, with 7 digits: numbers near 1.6 are 2⁻²³ apart, so that
# L = (ŷ − y)² is known to 2 · 0.68 · 2⁻²³ < 2⁻²², the bound that is allowed for rounding.

# %%
FLOAT32 = 2.0**-22
layer = nn.Linear(1, 1, bias=False)
nn.init.constant_(layer.weight, start)
loss = nn.functional.mse_loss(layer(torch.tensor([[x]])), torch.tensor([[y]]))
loss.backward()
check("torch_forward y_pred", layer(torch.tensor([[x]])), "0.75", FLOAT32)
check("torch_forward loss", loss, 0.02890000492334366, FLOAT32)
check("torch_forward loss_4dp", loss, "0.0289", FLOAT32)
check("autograd_grad w_4dp", layer.weight, "0.1500")
check("autograd_grad y_pred", layer(torch.tensor([[x]])), 0.75, FLOAT32)
check("autograd_grad loss_4dp", loss, "0.0289", FLOAT32)
check("autograd_grad grad_4dp", layer.weight.grad, "-1.7000", FLOAT32)

# %% [markdown]
# ## By this library
#
# `LinearRegression` has the formula of the gradient in its method `gradients`. Training uses the
# formula (`gradient="explicit"`) or autograd (`gradient="autograd"`). The loop is that of
# Lightning's `Trainer`, called by `train`; where the notebook picks CUDA, MPS or CPU by hand, it
# takes `accelerator="auto"`. `check_gradients` compares the formula with differences of the loss.

# %%
point = PointsData([x], [y])
for mode in ("explicit", "autograd"):
    model = LinearRegression(weight=[start], bias=False, lr=lr, gradient=mode)
    run = train(model, point, 2)
    check(f"autograd_grad {mode}", run.gradients[0], "-1.7000", FLOAT32)
    check(
        f"torch_sgd_2_epochs {mode}", run.losses, [0.02890000492334366, 0.4624001681804657], FLOAT32
    )
    check(
        f"my_gradient_2_epochs loss, {mode}",
        run.losses,
        [0.02890000492334366, 0.4624001681804657],
        FLOAT32,
    )
    check(
        f"my_gradient_2_epochs y_pred, {mode}",
        np.float32(run.weights[:2]) * 5,
        [0.75, 1.6000001430511475],
        FLOAT32,
    )

rows, targets = torch.tensor([[x]]), torch.tensor([y])
report = check_gradients(LinearRegression(weight=[start], bias=False), rows, targets)
print(*report.lines(), sep="\n")
check("manual_chain_rule_step formula", report.ok, True)

# %% [markdown]
# ## The mistake: a loop "by hand" that is torch's
#
# The notebook's last loop is meant to be pure Python. But `init_weight` had become a torch tensor
# some cells before, so it computes in float32 and prints ŷ = 1.6000001430511475. With Python's
# numbers it is 1.6000000000000003, as above.

# %% [markdown]
# ## The mistake: the loss rises
#
# The notebook printed the losses 0.0289 and 0.4624 and went on. The gradient is right, and it has
# the right sign: w must grow, from 0.15 to w* = y/x = 0.184. The step is too long. L is a parabola
# in w with the curvature 2x² = 50, and one update multiplies the error w − w* by 1 − 50 λ. At
# λ = 0.1 that is −4: w jumps over w* and lands on the other side, 4 times as far away, and each
# update multiplies the loss by 16. Above λ = 2/50 = 0.04 the error grows; at 1/50 = 0.02 one update
# lands on w*. This is `python scripts/train.py --config linear_diverges`.

# %%
torch.set_default_dtype(torch.float64)  # as precise as Python's own numbers
exact, best = (
    train(LinearRegression(weight=[start], bias=False, lr=rate), PointsData([x], [y]), 6)
    for rate in (lr, 0.02)
)
torch.set_default_dtype(torch.float32)
curvature, law = Curvature(torch.tensor([[2 * x * x]])), 0.0289 * 16.0 ** np.arange(6)
check("divergence_law curvature", curvature.largest, 50.0)
check("divergence_law lr_max", curvature.max_lr(), 0.04)
check("divergence_law lr_one_step", curvature.best_lr(), 0.02)
check("divergence_law w_star", best.weights[1], 0.184, 1e-15)
factor = 1 - lr * curvature.largest
check("divergence_law error_factor, loss_factor", [factor, factor**2], [-4.0, 16.0])
check("divergence_law loss_formula", exact.losses, law, 1e-12 * law)

# Each of the six updates multiplies the error of w by 4, that of rounding too: 4⁶ · 2⁻²⁴ < 3e-4.
run = train(LinearRegression(weight=[start], bias=False, lr=lr), point, 6)
check("divergence_law w_float32", run.weights[1:], "0.32 -0.36 2.36 -8.52 35.00 -139.08", 3e-4)
printed = "0.0289 0.4624 7.3984 118.3744 1893.9907 30303.8516"
check("divergence_law loss_float32", run.losses, printed, 1e-5 * law)

# %%
w = np.linspace(-0.5, 0.9, 100)
plt.plot(w, (w * x - y) ** 2, color="black", label="L = (5w − 0.92)²")
plt.plot(exact.weights[:3], exact.losses[:3], "o-", color="#D55E00", label="λ = 0.1")
plt.plot(best.weights[:2], best.losses[:2], "o-", color="#0072B2", label="λ = 0.02")
plt.gca().set(xlabel="w", ylabel="loss")
plt.legend()
plt.show()
conclude("000")
