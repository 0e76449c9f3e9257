"""Identities of the method that hold whatever the implementation; numbers as in the design page.

7 (batch norm), 10 (many processes) and 11 (scale-amended SGD) come with what they test.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import GENERIC, NETS, SPD, STRUCTURED, half_square
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn

import backmatch as bm
from backmatch.linalg import _library

LINEAR_BLOCKS = ("linear", "linear-no-bias", "linear-chain", "tall-batch", "wide", "narrow")


def sweep(blocks, x, loss, weights, inputs=None, **options):
    """One backward sweep that keeps its tensors."""
    inputs = bm.Gradient() if inputs is None else inputs
    matcher = bm.BackMatching(blocks, weights=weights, inputs=inputs, **options)
    return matcher.backward(x, loss, keep=True)


def linear_problem(m, n_in, n_out, bias=True, seed=0):
    """A Linear on top of an identity block, an input, a target."""
    torch.manual_seed(seed)
    top = nn.Linear(n_in, n_out, bias=bias).double()
    x = torch.randn(m, n_in, dtype=torch.float64)
    return [nn.Identity(), top], x, torch.randn(m, n_out, dtype=torch.float64)


def with_ones(x: Tensor, bias: bool = True) -> np.ndarray:
    """[x 1]."""
    return np.hstack([x.numpy(), np.ones((len(x), 1))]) if bias else x.numpy()


def stacked(step: dict[str, Tensor]) -> np.ndarray:
    """[weight bias] of a Linear's step, shape (n_out, n_in + 1)."""
    parts = [v.numpy().reshape(len(v), -1) for v in step.values()]
    return np.hstack(parts)


def jacobians(block: nn.Module, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Dense J_W and J_z of a deterministic block through torch.autograd.functional."""
    parameters = {n: p.detach() for n, p in block.named_parameters() if p.requires_grad}

    def value(u, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(block, named, (u.clone(),)).reshape(-1)

    parts = torch.autograd.functional.jacobian(value, (z, *parameters.values()))
    J_z, *J_W = [part.reshape(len(part), -1).numpy() for part in parts]
    return np.hstack([np.zeros((len(J_z), 0)), *J_W]), J_z


def largest(value) -> float:
    return float(np.abs(np.asarray(value)).max(initial=0.0))


class TestIdentity1GradientIsBackPropagation:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", NETS)
    def test_equals_autograd(self, name, reduction):
        blocks, x, loss = NETS[name].make()
        state = torch.get_rng_state()
        factor = 0.6 if reduction == "mean" else 0.6 / x.shape[0]
        sweep(blocks, x, loss, bm.Gradient(), target_step=0.6, reduction=reduction)
        twin, _, _ = NETS[name].make()
        torch.set_rng_state(state)
        loss(nn.Sequential(*twin)(x.clone())).backward()
        ours = nn.ModuleList(blocks).parameters()
        for p, q in zip(ours, nn.ModuleList(twin).parameters(), strict=True):
            expected = torch.zeros_like(q) if q.grad is None else q.grad
            got = torch.zeros_like(p) if p.grad is None else p.grad
            # "sum" leaves out m in r_B, the weights' 1/m stays.
            assert largest((got - factor * expected).numpy()) <= 1e-12

    def test_sequential_order_does_not(self):
        blocks, x, loss = NETS["tanh"].make()
        sweep(blocks, x, loss, bm.Gradient(), order="sequential")
        twin, _, _ = NETS["tanh"].make()
        loss(nn.Sequential(*twin)(x)).backward()
        assert largest((blocks[0][0].weight.grad - twin[0][0].weight.grad).numpy()) > 1e-6


class TestIdentity2LimitsOfDamping:
    @pytest.mark.parametrize("solver", [bm.Cholesky, bm.Auto, bm.CG])
    @pytest.mark.parametrize("name", [*LINEAR_BLOCKS, "relu", "tanh", "residual", "batch-norm"])
    def test_large_damping_gives_the_gradient(self, name, solver):
        damping = 1e13
        blocks, x, loss = NETS[name].make()
        sweep(blocks, x, loss, solver(damping), target_step=0.5)
        twin, _, _ = NETS[name].make()
        loss(nn.Sequential(*twin)(x)).backward()
        ours = nn.ModuleList(blocks).parameters()
        for p, q in zip(ours, nn.ModuleList(twin).parameters(), strict=True):
            assert largest((damping * p.grad - 0.5 * q.grad).numpy()) < 1e-10

    @pytest.mark.parametrize("solver", [bm.Cholesky, bm.Auto, bm.CG])
    @pytest.mark.parametrize("name", ["relu", "tanh", "features-3d", "residual", "batch-norm"])
    def test_large_damping_gives_the_input_gradient(self, name, solver):
        damping = 1e13
        blocks, x, loss = NETS[name].make()
        top = sweep(blocks, x, loss, bm.Gradient(), solver(damping)).blocks[-1]
        plain = sweep(blocks, x, loss, bm.Gradient(), bm.Gradient()).blocks[-1]
        assert largest((damping * top.input_step - plain.input_step).numpy()) < 1e-10

    @pytest.mark.parametrize("name", [*LINEAR_BLOCKS, "relu", "silu", "features-3d", "two-linears"])
    def test_damping_zero_gives_the_pseudo_inverse(self, name):
        blocks, z, loss = NETS[name].make()
        steps = sweep(blocks, z, loss, bm.Cholesky(0.0), bm.Cholesky(0.0)).blocks
        for index, (block, step) in enumerate(zip(blocks, steps, strict=True)):
            J_W, J_z = jacobians(block, z)
            r = step.displacement.numpy().ravel()
            got = np.concatenate([v.numpy().ravel() for v in step.weight_step.values()])
            want = np.linalg.pinv(J_W, rcond=1e-9) @ r
            assert largest(got - want) < 1e-10 * np.linalg.cond(J_W) * (1 + largest(want))
            if index:
                want = np.linalg.pinv(J_z, rcond=1e-9) @ r
                error = largest(step.input_step.numpy().ravel() - want)
                assert error < 1e-9 * (1 + largest(want))
            z = block(z.clone()).detach()

    def test_small_damping_tends_to_damping_zero(self):
        blocks, x, y = linear_problem(12, 4, 3)
        exact = sweep(blocks, x, lambda z: half_square(z, y), bm.Cholesky(0.0)).blocks[1]
        gaps = []
        for damping in (1e-2, 1e-4, 1e-6):
            near = sweep(blocks, x, lambda z: half_square(z, y), bm.Cholesky(damping)).blocks[1]
            gaps.append(largest(stacked(near.weight_step) - stacked(exact.weight_step)))
        assert gaps[1] < 2e-2 * gaps[0]
        assert gaps[2] < 2e-2 * gaps[1]

    @pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 5), (7, 7), (33, 65), (65, 33)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_primal_equals_dual(self, m, n, masked):
        g = torch.Generator().manual_seed(m)
        Z = torch.randn(m, n, generator=g, dtype=torch.float64)
        R = torch.randn(9, m, generator=g, dtype=torch.float64)
        D = torch.randn(9, m, generator=g, dtype=torch.float64)
        D = D * (torch.rand(9, m, generator=g) < 0.5) if masked else D
        damping = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
        dual = bm.linalg.scaled_gram_solve(Z @ Z.T, D, R, damping=damping) @ Z
        gram = bm.linalg.weighted_gram(Z, D.square())
        primal = bm.linalg.spd_solve(gram, ((D * R) @ Z)[..., None], damping=damping)[..., 0]
        ridge = bm.linalg.ridge(Z, R, slopes=D, damping=damping)
        assert largest((primal - dual).numpy()) < 1e-11
        assert largest((primal - ridge).numpy()) < 1e-11

    @pytest.mark.parametrize("name", ["orthonormal", "n7-cond1e3", "n33-cond1e3", "cond1e1"])
    def test_cg_equals_cholesky_equals_scipy(self, name):
        A, B = SPD[name].make()
        n = A.shape[-1]
        scipy = np.stack(
            [cho_solve(cho_factor(a + 0.1 * np.eye(n)), b) for a, b in zip(A, B, strict=True)]
        )
        A, B = torch.from_numpy(A), torch.from_numpy(B)
        direct = bm.linalg.spd_solve(A, B, damping=0.1).numpy()
        iterated = bm.linalg.cg(A, B, damping=0.1, rtol=1e-14, max_steps=20 * n)
        assert largest(direct - scipy) < 1e-12
        assert largest(iterated.x.numpy() - scipy) < 1e-11

    @pytest.mark.parametrize("name", ["relu", "tanh", "wide", "narrow", "residual", "batch-norm"])
    def test_cg_equals_cholesky_in_the_sweep(self, name):
        steps = []
        for solver in (bm.CG(0.3, rtol=1e-14, max_steps=500), bm.Cholesky(0.3)):
            blocks, x, loss = NETS[name].make()
            steps.append(sweep(blocks, x, loss, solver, solver, strict=False).blocks)
        for a, b in zip(*steps, strict=True):
            for key, value in a.weight_step.items():
                assert largest((value - b.weight_step[key]).numpy()) < 1e-10


class TestIdentity3LinearIsRidgeRegression:
    @pytest.mark.parametrize("solver", [bm.Cholesky, bm.Auto])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("m", "n_in", "n_out"), [(20, 5, 3), (4, 9, 6), (7, 6, 1), (1, 3, 2)])
    @pytest.mark.parametrize("damping", [1e-3, 0.3, 10.0])
    def test_equals_numpy_lstsq_on_the_augmented_system(
        self, m, n_in, n_out, bias, damping, solver
    ):
        blocks, x, y = linear_problem(m, n_in, n_out, bias)
        step = sweep(blocks, x, lambda z: half_square(z, y), solver(damping)).blocks[1]
        Z = with_ones(x, bias)
        augmented = np.vstack([Z, np.sqrt(m * damping) * np.eye(Z.shape[1])])
        right = np.vstack([step.displacement.numpy(), np.zeros((Z.shape[1], n_out))])
        expected = np.linalg.lstsq(augmented, right, rcond=None)[0].T
        assert largest(stacked(step.weight_step) - expected) < 1e-10


class TestIdentity4OrthonormalWeights:
    @pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
    def test_exact_input_step_is_the_gradient_over_c_squared(self, c):
        blocks, x, y = linear_problem(6, 5, 5)
        Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
        with torch.no_grad():
            blocks[1].weight.copy_(c * Q)
        loss = lambda z: half_square(z, y)  # noqa: E731
        exact = sweep(blocks, x, loss, bm.Gradient(), bm.Cholesky(0.0)).blocks[1].input_step
        plain = sweep(blocks, x, loss, bm.Gradient(), bm.Gradient()).blocks[1].input_step
        assert largest((exact - plain / c**2).numpy()) < 1e-12

    @pytest.mark.parametrize("damping", [0.0, 0.3, bm.Relative(0.1)])
    @pytest.mark.parametrize(("n_in", "n_out"), [(4, 7), (7, 4)])
    def test_input_step_does_not_see_a_rotation_of_the_target_space(self, n_in, n_out, damping):
        blocks, x, y = linear_problem(6, n_in, n_out)
        Q = torch.linalg.qr(torch.randn(n_out, n_out, dtype=torch.float64))[0]
        solver = bm.Cholesky(damping)
        plain = sweep(blocks, x, lambda z: half_square(z, y), bm.Gradient(), solver).blocks[1]
        with torch.no_grad():
            blocks[1].weight.copy_(Q @ blocks[1].weight)
            blocks[1].bias.copy_(Q @ blocks[1].bias)
        turned = sweep(blocks, x, lambda z: half_square(z, y @ Q.T), bm.Gradient(), solver).blocks[
            1
        ]
        assert largest((turned.displacement - plain.displacement @ Q.T).numpy()) < 1e-12
        assert largest((turned.input_step - plain.input_step).numpy()) < 1e-11


class TestIdentity5OneStepSolvesALinearLayer:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("m", "n_in", "n_out"), [(30, 5, 3), (4, 9, 2), (6, 5, 4)])
    @pytest.mark.parametrize("start", [0.0, 1.0, 50.0])
    def test_lands_on_the_least_squares_solution(self, m, n_in, n_out, bias, start):
        blocks, x, y = linear_problem(m, n_in, n_out, bias)
        with torch.no_grad():
            blocks[1].weight.mul_(start)
        optimizer = torch.optim.SGD(blocks[1].parameters(), lr=1.0)
        optimizer.zero_grad()
        sweep(blocks[1:], x, lambda z: half_square(z, y), bm.Cholesky(0.0))
        optimizer.step()
        best, Z = None, with_ones(x, bias)
        best = np.linalg.lstsq(Z, y.numpy(), rcond=None)[0]
        assert largest(blocks[1](x).detach().numpy() - Z @ best) < 1e-10
        if m > Z.shape[1]:
            got = stacked({n: p.detach() for n, p in blocks[1].named_parameters()})
            assert largest(got - best.T) < 1e-10

    def test_nn_mse_loss_needs_its_target_step(self):
        blocks, x, y = linear_problem(30, 5, 4)
        step = sweep(
            blocks, x, lambda z: nn.functional.mse_loss(z, y), bm.Gradient(), target_step=4 / 2
        )
        assert largest((step.output + step.blocks[1].displacement - y).numpy()) < 1e-13


class TestIdentity6LocalLoss:
    @pytest.mark.parametrize("name", [net.name for net in [*STRUCTURED, *GENERIC]])
    @pytest.mark.parametrize("damping", [0.0, 0.3, bm.Relative(0.1)])
    def test_never_rises_by_an_exact_linear_step(self, name, damping):
        if name == "dropout":
            pytest.skip("this oracle cannot replay a dropout mask")
        blocks, z, loss = NETS[name].make()
        solver = bm.Cholesky(damping)
        steps = sweep(blocks, z, loss, solver, solver).blocks
        fresh, _, _ = NETS[name].make()
        for block, step in zip(fresh, steps, strict=True):
            r = step.displacement.numpy().ravel()
            d_w = np.concatenate(
                [np.zeros(0), *(v.numpy().ravel() for v in step.weight_step.values())]
            )
            pairs = [(0, d_w)]
            if step.input_step is not None:
                pairs.append((1, step.input_step.numpy().ravel()))
            both = jacobians(block, z) if z.is_floating_point() else None
            for side, d in pairs if both else []:
                J = both[side]
                if J.size == 0:
                    continue
                left = r - J @ d
                assert left @ left <= (r @ r) * (1 + 1e-12)
                if damping == 0.0:
                    # Directions below the cut are not solved for; their share is below it too.
                    bound = 1e-10 + 1e-7 * (np.linalg.cond(J) > 1e7)
                    assert largest(J.T @ left) <= bound * max(1.0, largest(J)) * max(
                        1.0, largest(r)
                    )
            z = block(z.clone()).detach()


class TestIdentity8ChainedPseudoInverses:
    def test_block_by_block_is_not_gauss_newton_target_propagation(self):
        torch.manual_seed(8)
        lower = nn.Linear(7, 5, bias=False).double()
        upper = nn.Linear(5, 9, bias=False).double()
        x, y = torch.randn(4, 7).double(), torch.randn(4, 9).double()
        # Wide the other way round as well: W2 (9, 5) @ W1 (5, 7) has full rank 5 and both
        # pseudo-inverses multiply; W2 (3, 5) does not.
        for top, same in [(upper, True), (nn.Linear(5, 3, bias=False).double(), False)]:
            target = y[:, : top.out_features]
            step = sweep(
                [nn.Identity(), lower, top], x, lambda z, t=target: half_square(z, t),
                bm.Gradient(), bm.Cholesky(0.0),
            )  # fmt: skip
            W1, W2 = lower.weight.detach().numpy(), top.weight.detach().numpy()
            r = step.blocks[2].displacement.numpy()
            chained = r @ np.linalg.pinv(W2).T @ np.linalg.pinv(W1).T
            joint = r @ np.linalg.pinv(W2 @ W1).T
            got = step.blocks[1].input_step.numpy()
            assert largest(got - chained) < 1e-10
            assert (largest(got - joint) < 1e-10) == same


class TestIdentity9OrderAndChunks:
    @pytest.mark.parametrize("name", ["relu", "tanh", "features-3d", "residual", "cross-entropy"])
    def test_batch_order_does_not_matter(self, name):
        net = NETS[name]
        blocks, x, loss = net.make()
        turn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        back = torch.argsort(turn)
        solver = bm.Auto(bm.Relative(0.1))
        plain = sweep(blocks, x, loss, solver, solver).blocks
        turned = sweep(blocks, x[turn], lambda z: loss(z[back]), solver, solver).blocks
        for a, b in zip(plain, turned, strict=True):
            assert largest((a.displacement[turn] - b.displacement).numpy()) < 1e-10
            for key, value in a.weight_step.items():
                assert largest((value - b.weight_step[key]).numpy()) < 1e-10

    @pytest.mark.parametrize("name", ["relu", "wide", "tall-batch", "features-3d", "residual"])
    @pytest.mark.parametrize("damping", [0.0, bm.Relative(0.1)])
    def test_chunk_size_does_not_matter(self, name, damping, monkeypatch):
        results = []
        for budget in (_library.WORKSPACE_BYTES, 1):
            monkeypatch.setattr(_library, "WORKSPACE_BYTES", budget)
            blocks, x, loss = NETS[name].make()
            solver = bm.Cholesky(damping)
            results.append(sweep(blocks, x, loss, solver, solver).blocks)
        for a, b in zip(*results, strict=True):
            for key, value in a.weight_step.items():
                assert largest((value - b.weight_step[key]).numpy()) < 1e-10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [3, 17, 33, 64])
    def test_kernels_give_equal_bits_for_any_threads_and_any_split(self, n, dtype):
        g = torch.Generator().manual_seed(n)
        Z = torch.randn(37, n, n + 2, generator=g, dtype=dtype)
        A, B = Z @ Z.mT, torch.randn(37, n, 2, generator=g, dtype=dtype)
        D = torch.randn(37, n, generator=g, dtype=dtype).relu()
        kernels = {
            "spd_solve": lambda s: bm.linalg.spd_solve(A[s], B[s], damping=0.1),
            "scaled_gram_solve": lambda s: bm.linalg.scaled_gram_solve(
                A[0], D[s], B[s, :, 0], damping=0.1
            ),
            "weighted_gram": lambda s: bm.linalg.weighted_gram(A[0], D[s]),
            "cg": lambda s: bm.linalg.cg(A[s], B[s], damping=1.0, rtol=1e-3).x,
        }
        threads = torch.get_num_threads()
        everything = slice(None)
        whole = {name: kernel(everything) for name, kernel in kernels.items()}
        try:
            for name, count in itertools.product(kernels, (1, 2)):
                torch.set_num_threads(count)
                pieces = [kernels[name](slice(a, b)) for a, b in [(0, 1), (1, 12), (12, 37)]]
                assert torch.equal(torch.cat(pieces), whole[name]), (name, count)
        finally:
            torch.set_num_threads(threads)
