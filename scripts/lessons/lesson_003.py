# %% [markdown]
# # Lesson 003: what is gradient descent?
#
# The line y = 3x, the model ŷ = w x, the loss L = 1/N Σ r² with the errors r = ŷ − y. Each step
# predicts, measures the loss, takes the slope dL/dw = 2/N Σ x r, and changes w against it:
# w ← w − 0.01 dL/dw. (Lesson 001 explains the slope, and what `check` prints.)

# %%
import matplotlib.pyplot as plt
import numpy as np

from lightning_gd import LinearRegression, PointsData
from teaching import check, conclude, loss_rounding, train

x = np.array([1, 2, 3, 4])
y = 3 * x
points = PointsData(x.tolist(), y.tolist())

# %% [markdown]
# ## Eleven steps by NumPy
#
# In each line the notebook prints the prediction, the weight **before** the step, the loss, and the
# weight after it. Integers and floats are float64 here; 1e-14 allows for their rounding. The
# predictions are rows of w x, for w before the steps 0 to 6.

# %%
w, before, losses = 0, [], []
for _ in range(11):
    prediction = w * x
    gradient = np.dot(2 * x, prediction - y).mean()
    losses.append(((prediction - y) ** 2).mean())
    before.append(w)
    w = w - 0.01 * gradient
after = np.array([*before[1:], w])
printed = [0, 1.8, 2.52, 2.808, 2.9232, 2.96928, 2.987712, 2.9950848]
check("numpy_sum_gradient_11 weight_before", before[:8], printed, 1e-14)
printed = """0 0 0 0    1.8 3.6 5.4 7.2    2.52 5.04 7.56 10.08    2.808 5.616 8.424 11.232
             2.9232 5.8464 8.7696 11.6928    2.96928 5.93856 8.90784 11.87712
             2.987712 5.975424 8.963136 11.950848"""
check("numpy_sum_gradient_11 predictions", np.outer(before[:7], x), printed)
check("numpy_sum_gradient_11 loss", losses[:7], "67.500 10.800 1.728 0.276 0.044 0.007 0.001")
check("numpy_sum_gradient_11 w_after", after[:7], "1.800 2.520 2.808 2.923 2.969 2.988 2.995")

# The notebook's text stops at step 7. The rest:
printed = [2.9950848, 2.99803392, 2.999213568, 2.9996854272]
check("numpy_sum_gradient_11_rest weight_before", before[7:], printed, 1e-14)
check("numpy_sum_gradient_11_rest loss", losses[7:], "0.000 0.000 0.000 0.000")
check("numpy_sum_gradient_11_rest w_after", after[7:], "2.998 2.999 3.000 3.000")
check("numpy_sum_gradient_11_rest final prediction", prediction, "3.000 5.999 8.999 11.999")

# %% [markdown]
# ## The same by autograd, and by formula
#
# `train` runs Lightning's `Trainer`. In the mode `autograd` torch derives the slope from the loss,
# in `explicit` the model's method `gradients` computes it by the formula. In float32 both give the
# digits that the notebook printed by autograd. (Its run of 25 steps begins like that of 11.
# Float32 numbers from 8 to 16 are 2⁻²⁰ apart: `loss_rounding` is what that does to a loss.)

# %%
for mode in ("explicit", "autograd"):
    run = train(LinearRegression(bias=False, lr=0.01, gradient=mode), points, 25)
    weights, predictions = run.weights, np.outer(run.weights, x)
    printed = "-45.0000 -38.2500 -32.5125 -27.6356 -23.4903"
    check(f"torch_autograd_11 gradient, {mode}", run.gradients[:5], printed)
    check(f"torch_autograd_25 gradient, {mode}", run.gradients[:6], f"{printed} -19.9667")
    printed = "0.4500 0.8325 1.1576 1.4340 1.6689"
    check(f"torch_autograd_11 w after, {mode}", weights[1:6], printed)
    check(f"torch_autograd_25 w after, {mode}", weights[1:7], f"{printed} 1.8686")
    check(f"torch_autograd_11 prediction 2, {mode}", predictions[2], "0.8325 1.6650 2.4975 3.3300")
    check(f"torch_autograd_11 prediction 4, {mode}", predictions[4], "1.4340 2.8680 4.3019 5.7359")
    check(f"torch_autograd_25 prediction 5, {mode}", predictions[5], "1.6689 3.3378 5.0067 6.6755")
    check(f"torch_autograd_rest w after 11, 25, {mode}", weights[[11, 25]], "2.4980 2.9484")
    for name, steps, printed in (
        ("torch_autograd_11", [0, 2], [67.5, 35.23542022705078]),
        ("torch_autograd_25", [0, 5], [67.5, 13.289022445678711]),
        ("torch_autograd_rest", [10, 24], [2.6162679195404053, 0.027632078155875206]),
    ):
        loss = run.losses[steps]
        check(f"{name} loss {steps}, {mode}", loss, printed, loss_rounding(loss, 2.0**-20))

# %% [markdown]
# ## The mistake: "by hand converges faster"
#
# After 11 steps the loop by hand is at 2.9999 and torch at 2.4980, and the notebook concludes that
# the loop converges faster. But `np.dot(2 * x, r)` is the sum of the slopes, and `.mean()` of one
# number is that number: the loop takes 4 times the slope of the loss. A sum with λ = 0.01 is the
# mean with λ = 0.04. Trained so, formula and autograd take the path of the loop, w = 3 (1 − 0.4ᵏ).
# With λ = 0.01 they take w = 3 (1 − 0.85ᵏ). Each factor is 1 − λ · 15, where 15 = 2/N Σ x².

# %%
k = np.arange(1, 12)
check("numpy_sum_gradient_11_rest w", after, 3 * (1 - 0.4**k), 1e-14)
check("numpy_sum_gradient_11_rest loss", losses, 67.5 * 0.16 ** (k - 1), 1e-12)
for mode in ("explicit", "autograd"):
    for lr, q, name in (
        (0.04, 0.4, "numpy_sum_gradient_11_rest"),
        (0.01, 0.85, "torch_autograd_rest"),
    ):
        exact = train(LinearRegression(bias=False, lr=lr, gradient=mode).double(), points, 11)
        check(f"{name} w at λ = {lr}, {mode}", exact.weights[k], 3 * (1 - q**k), 1e-14)
        check(f"{name} loss at λ = {lr}, {mode}", exact.losses, 67.5 * q ** (2 * k - 2), 1e-12)

plt.plot(before, "o-", color="#D55E00", label="loop by hand: the sum, λ = 0.01")
plt.plot(run.weights, color="#0072B2", label="torch: the mean, λ = 0.01")
plt.gca().set(xlabel="step", ylabel="w")
plt.legend()
plt.show()

# %% [markdown]
# ## Two numbers that do not belong together, and a run that began twice
#
# Beside the prediction and the loss of a step stands the weight after it: at step 0 the loss 67.5
# belongs to w = 0, and not to the 0.4500 in the same line. With w = 0.45 the loss is 48.76875.
#
# The run of 25 steps starts from 0 because the cell that sets w was run again. From top to bottom
# it would have started from 2.4980, where the run of 11 ended.

# %%
check("torch_autograd_11 loss at w = 0.45", run.losses[1], "48.76875", loss_rounding(48.8))
conclude("003")
