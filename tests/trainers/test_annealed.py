"""Annealed sampling of products against integrals on a grid, with exact predictions: Gaussians of different variances, mixtures.

Random tests have a seed; their tolerances are at least four standard errors of the samples, with the s.e. beside them.
"""

import numpy as np
import pytest
import torch

from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.annealed import AnnealedSampler, ShardNoise, angle_grid, condition_predictions
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import starting_noise

SCHEDULE = NoiseSchedule(clip_sample=False)
COUNT = 8192
PLAIN = AnnealedSampler(langevin_steps=0, resample_below=0)  # the composed prediction followed by DDIM alone
CORRECTED = AnnealedSampler(resample_below=0)  # with Langevin corrections, without weights


def line(*components):
    means, stds, weights = zip(*components, strict=True)
    return GaussianMixture(np.array(means)[:, None], np.array(stds), np.array(weights))


AND = ([line((-1.0, 0.5, 1.0)), line((1.0, 1.0, 1.0))], (0.5, 0.5))
RATIO = ([line((0.0, 0.6, 1.0)), line((1.0, 1.5, 1.0))], (1 / 0.6, -0.4 / 0.6))  # q / (q^1)^0.4, tempered
MODES = (
    [line((-1.5, 0.4, 0.4), (1.5, 0.4, 0.6)), line((-1.5, 0.5, 0.9), (0.0, 2.0, 0.1))],
    (1 / 0.7, -0.3 / 0.7),
)


def exact(laws, coefficients):
    """(mean, variance, mass right of 0, log Z) of the product by quadrature."""
    x = np.linspace(-12, 12, 24001)
    log_weight = sum(c * law.log_density(x[:, None]) for c, law in zip(coefficients, laws, strict=True))
    density = np.exp(log_weight)
    total = density.sum() * (x[1] - x[0])
    density *= (x[1] - x[0]) / total
    mean = density @ x
    return mean, density @ (x - mean) ** 2, density[x > 0].sum(), np.log(total)


@pytest.fixture(scope="module")
def draw(conditional_denoiser):
    def run(case, sampler=None, *, count=COUNT, seed=0, systems=1):
        laws, coefficients = case
        shards, counts = range(systems), dict.fromkeys(range(systems), count // systems)
        address = {"seed": seed, "counter": 3, "shards": shards, "counts": counts}
        noise = ShardNoise.addressed(purpose=1, **address)
        denoiser = conditional_denoiser(laws, SCHEDULE)
        return (sampler or AnnealedSampler())(
            denoiser, coefficients, starting_noise(shape=(1,), **address), SCHEDULE, noise
        )

    return run


# -- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [AND, RATIO, MODES], ids=["and", "ratio", "modes"])
def test_means_variances_and_modes_of_products_are_right(draw, case):
    mean, variance, right, _ = exact(*case)
    x = draw(case).x_0.double().numpy()
    # s.e. of 8192 samples, a fifth wider for their common ancestors: 0.013 std, 1.9 percent (more for two modes), 0.0066
    assert x.mean() == pytest.approx(mean, abs=4 * 0.013 * variance**0.5)
    assert x.var() == pytest.approx(variance, rel=0.08)
    assert (x > 0).mean() == pytest.approx(right, abs=4 * 0.0066)


@pytest.mark.parametrize(("case", "off"), [(AND, 0.3), (RATIO, 0.1), (MODES, 0.2)], ids=["and", "ratio", "modes"])
def test_without_corrections_the_composed_prediction_samples_another_law(draw, case, off):
    mean, variance, _, _ = exact(*case)
    x = draw(case, PLAIN).x_0.double().numpy()
    assert abs(x.mean() - mean) > off  # 0.38, 0.15 and 0.30 measured; standard errors are 0.01
    assert abs(x.var() / variance - 1) > 0.1


def test_corrections_alone_are_right_for_one_mode_and_leave_the_modes_shares_wrong(draw):
    mean, variance, _, _ = exact(*AND)
    x = draw(AND, CORRECTED).x_0.double().numpy()
    assert x.mean() == pytest.approx(mean, abs=0.04)  # s.e. 0.007, and what 48 corrections leave
    assert x.var() == pytest.approx(variance, rel=0.08)
    _, _, right, _ = exact(*MODES)
    share = (draw(MODES, CORRECTED).x_0.numpy() > 0).mean()
    assert right - share > 0.03  # 0.05 measured, s.e. 0.004: modes part before their masses are those of the product


def test_the_corrections_keep_a_gaussians_variance_at_long_steps(draw):
    # Euler's scheme at a step of two variances would leave twice the variance at every level, and 1.1 at the last.
    law = ([line((0.3, 0.5, 1.0))], (1.0,))
    x = draw(law, AnnealedSampler(langevin_steps=4, langevin_step_size=2.0)).x_0.double().numpy()
    assert x.var() == pytest.approx(0.25, rel=4 * 0.016)
    assert x.mean() == pytest.approx(0.3, abs=4 * 0.0055)


def test_resampling_at_every_level_moves_all_that_belongs_to_a_sample(draw):
    mean, variance, right, _ = exact(*MODES)
    x = draw(MODES, AnnealedSampler(resample_below=1.0), count=4096).x_0.double().numpy()
    # s.e. for common ancestors a third wider than of 4096 independent samples
    assert (x > 0).mean() == pytest.approx(right, abs=4 * 0.0064)
    within = x[x > 0.5].std()
    grid = np.linspace(0.5, 6, 5501)
    log_p = sum(c * law.log_density(grid[:, None]) for c, law in zip(MODES[1], MODES[0], strict=True))
    weights = np.exp(log_p - log_p.max())
    centre = np.average(grid, weights=weights)
    assert within == pytest.approx(np.average((grid - centre) ** 2, weights=weights) ** 0.5, rel=4 * 0.016)
    assert x.mean() == pytest.approx(mean, abs=4 * 0.021 * variance**0.5)


def test_a_coefficient_of_one_gives_the_condition_itself(draw):
    laws = [MODES[0][1], MODES[0][0]]
    x = draw((laws, (0.0, 1.0))).x_0.double().numpy()
    assert (x > 0).mean() == pytest.approx(0.6, abs=4 * 0.0054)
    assert x.var() == pytest.approx(0.4**2 + 1.5**2 * 0.96, rel=0.06)


# -- the normaliser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [AND, RATIO, MODES], ids=["and", "ratio", "modes"])
def test_log_z_is_right_and_its_standard_error_honest(draw, case):
    population = draw(case, count=24 * 256, systems=24)
    estimates = population.log_normalizers[::256]
    stderrs = np.sqrt(population.log_normalizer_variances[::256])
    spread = estimates.std(ddof=1)
    # 0.02 for levels and corrections; a standard deviation of 24 is known to 15 percent.
    assert estimates.mean() == pytest.approx(exact(*case)[3], abs=0.02 + 4 * spread / 24**0.5)
    assert 0.4 < spread / np.sqrt(np.mean(stderrs**2)) < 1.6


def test_without_resampling_log_z_is_that_of_thermodynamic_integration(draw):
    sampler = AnnealedSampler(levels=48, langevin_steps=4, resample_below=0)
    for case in (AND, RATIO):
        population = draw(case, sampler, count=2048)
        # s.e. below 0.01; the lag of the samples behind their levels costs another 0.03
        assert population.log_normalizers[0] == pytest.approx(exact(*case)[3], abs=0.07)
        assert len(np.unique(population.ancestors)) == 2048


# -- random numbers and systems -----------------------------------------------------------------------------------


def test_systems_drawn_together_and_apart_are_the_same(draw, conditional_denoiser):
    laws, coefficients = MODES
    together = draw(MODES, count=128, systems=4)
    for shard in range(4):
        address = {"seed": 0, "counter": 3, "shards": [shard], "counts": {shard: 32}}
        alone = AnnealedSampler()(
            conditional_denoiser(laws, SCHEDULE),
            coefficients,
            starting_noise(shape=(1,), **address),
            SCHEDULE,
            ShardNoise.addressed(purpose=1, **address),
        )
        part = slice(32 * shard, 32 * shard + 32)
        assert torch.equal(together.x_0[part], alone.x_0)
        assert (together.ancestors[part] - 32 * shard == alone.ancestors).all()
        assert (together.log_normalizers[part] == alone.log_normalizers).all()


def test_samples_follow_from_the_starting_noise_alone(conditional_denoiser):
    laws, coefficients = MODES
    denoiser = conditional_denoiser(laws, SCHEDULE)
    start = starting_noise(seed=1, counter=0, shards=[0], counts={0: 64}, shape=(1,))
    first, second = (AnnealedSampler()(denoiser, coefficients, start, SCHEDULE).x_0 for _ in range(2))
    assert torch.equal(first, second)
    other = AnnealedSampler()(denoiser, coefficients, start.flip(0), SCHEDULE).x_0
    assert not torch.isin(other, first).any()


def test_numbers_differ_between_seeds_purposes_counters_and_shards():
    drawn = [
        ShardNoise.addressed(seed=a, purpose=b, counter=c, shards=[d], counts={d: 500}).normal((1,)).flatten()
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 2**41)
        for d in (0, 1)
    ]
    assert len(torch.cat(drawn).unique()) > 7900  # of 8000; an overlap would bring hundreds of repeated numbers


def test_every_system_has_its_own_weights_and_an_empty_one_is_no_trouble(conditional_denoiser):
    laws, coefficients = MODES
    counts = {0: 40, 1: 0, 2: 24}
    address = {"seed": 0, "counter": 0, "shards": [0, 1, 2], "counts": counts}
    population = AnnealedSampler(resample_below=1.0)(
        conditional_denoiser(laws, SCHEDULE),
        coefficients,
        starting_noise(shape=(1,), **address),
        SCHEDULE,
        ShardNoise.addressed(purpose=1, **address),
    )
    assert len(population.x_0) == 64
    assert population.ancestors[:40].max() < 40 <= population.ancestors[40:].min()
    assert len(np.unique(population.log_normalizers)) == 2
    assert 0 < population.effective_share < 1


def test_a_system_of_one_stays_finite(conditional_denoiser):
    laws, coefficients = RATIO
    start = starting_noise(seed=0, counter=0, shards=[0], counts={0: 1}, shape=(1,))
    population = AnnealedSampler()(conditional_denoiser(laws, SCHEDULE), coefficients, start, SCHEDULE)
    assert abs(float(population.x_0)) < 5


# -- pieces -------------------------------------------------------------------------------------------------------


def test_levels_go_down_to_the_cleanest_evenly_in_angle():
    timesteps = angle_grid(SCHEDULE, 24)
    assert timesteps[0] == 999 and timesteps[-1] == 0
    steps = np.diff(np.arccos(np.sqrt(SCHEDULE.alpha_bar[timesteps])))
    assert (steps < 0).all() and steps.min() == pytest.approx(steps.max(), rel=0.15)  # whole timesteps: 7 percent off
    coarse = NoiseSchedule(num_train_timesteps=10, beta_end=0.5)
    assert angle_grid(coarse, 24) == list(range(9, -1, -1))  # no more levels than there are


def test_predictions_of_all_conditions_do_not_depend_on_how_rows_are_split(conditional_denoiser):
    denoiser = conditional_denoiser([*AND[0], RATIO[0][0]], SCHEDULE)
    x_t = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    timestep = torch.tensor([5, 900, 40, 40, 700, 0, 999])
    whole = condition_predictions(denoiser, x_t, timestep, [2, 0])
    assert torch.equal(whole, condition_predictions(denoiser, x_t, timestep, [2, 0], max_rows=5))
    expected = [denoiser(x_t, timestep, torch.full_like(timestep, k)) for k in (2, 0)]
    assert torch.equal(whole, torch.stack(expected))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": 1}, "levels=1"),
        ({"langevin_steps": -1}, "langevin_steps=-1"),
        ({"resample_below": 1.5}, r"resample_below=1\.5"),
        ({"langevin_step_size": 4.0}, r"langevin_step_size=4\.0"),
        ({"langevin_step_size": float("nan")}, "langevin_step_size=nan"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        AnnealedSampler(**given)


def test_bad_coefficients_and_counts_are_refused(conditional_denoiser):
    denoiser = conditional_denoiser(RATIO[0], SCHEDULE)
    start = torch.zeros((4, 1))
    for bad in ((1.0, -0.4), (float("nan"), 1.0)):  # the first: not tempered by 1 / (1 - Lambda)
        with pytest.raises(ValueError, match="give finite numbers with sum 1"):
            AnnealedSampler()(denoiser, bad, start, SCHEDULE)
    noise = ShardNoise.addressed(seed=0, purpose=0, counter=0, shards=[0], counts={0: 3})
    with pytest.raises(ValueError, match=r"noise\.counts=\[3\] do not sum to the 4 samples"):
        AnnealedSampler()(denoiser, RATIO[1], start, SCHEDULE, noise)


def test_samples_that_run_away_are_reported():
    def broken(x_t, timestep, condition):
        return torch.full_like(x_t, float("inf"))

    with pytest.raises(ValueError, match="samples are not finite"):
        AnnealedSampler()(broken, (1.0,), torch.zeros((4, 1)), SCHEDULE)
