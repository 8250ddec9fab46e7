"""The page of meta-learning's results, on numbers worked by hand."""

from __future__ import annotations

from typing import Any

from tasks.meta_page import render

ABOUT = {"command": "python -m benchmarks.made_up", "commit": "0123456789ab"}


def study(**more: Any) -> dict[str, Any]:
    return {
        "study": "sinusoid",
        "question": "How few steps?",
        "seeds": [100, 101],
        "provenance": ABOUT,
        **more,
    }


def test_what_was_not_run_is_one_line() -> None:
    page = render({})
    assert page.count("Not run yet") == 14
    assert "there is no `benchmarks/results/meta_learning/cheetah_direction.json`" in page


def test_values_are_means_over_seeds_and_a_diverging_one_is_named() -> None:
    page = render(
        {
            "sinusoid": study(
                environments=["1 step", "10 steps"],
                arms={
                    "MAML": {"scores": [[0.6, 0.2], [0.8, 0.4]]},
                    "other": {"scores": [[1.0, None], [2.0, 3.0]]},
                },
                order=["other", "MAML"],
                notes=["A note."],
            )
        }
    )
    assert "| other | 1.500 (1.000 · 2.000) | diverged |" in page
    assert "| MAML | 0.700 (0.600 · 0.800) | 0.300 (0.200 · 0.400) |" in page
    assert page.index("| other") < page.index("| MAML") and "- A note." in page
    assert "How few steps?" in page and "`python -m benchmarks.made_up`; commit `0123456789ab`" in page


def test_returns_stand_over_the_papers() -> None:
    arms = {
        "maml": {"scores": [[-10.0], [-12.0]], "extra": {"returns": [[-40.0, -10.0], [-42.0, -12.0]], "mean_returns": [-41, -11]}},
        "oracle": {"scores": [[-1.0], [-1.0]], "extra": {"returns": [[-1.0], [-1.0]], "mean_returns": [-1.0]}},
    }  # fmt: skip
    found = study(
        environments=["navigation"], arms=arms, order=["maml", "oracle"], missing=["pretrained"], published=[-40.41, -11.68, -3.33]
    )  # fmt: skip
    page = render({"navigation": found})
    assert "| maml | −41.000 (−40.000 · −42.000) | −11.000 (−10.000 · −12.000) |" in page
    assert "| oracle | −1.000 (−1.000 · −1.000) |  |" in page
    assert "| *MAML, the paper* | −40.4 | −11.7 |" in page and "Not run: pretrained." in page


def test_bandits_show_every_method_beside_the_paper() -> None:
    run = {
        "mean": 6.7,
        "seconds": 250.4,
        "env_steps": 6_000_000,
        "config": {"width": 64, "updates": 300, "trials": 2000, "state_action": "joint"},
    }
    setting = {
        "paper": {"gittins": 6.6, "rl2": 6.7},
        "trials": 10_000,
        "baselines": {
            "gittins": {
                "mean": 6.61,
                "standard_error": 0.018,
                "rl2_gain": 0.04,
                "rl2_gain_standard_error": 0.01,
            }
        },
        "rl2": {"100": run, "101": {**run, "mean": 6.6}},
        "rl2_mean": 6.65,
    }
    page = render({"bandits": {"settings": {"bandits-10-5": setting}, "provenance": ABOUT}})
    assert "### 5 arms, 10 pulls" in page
    assert "| gittins | 6.61 ± 0.02 | 6.6 | +0.04 ± 0.010 |" in page
    assert "| **RL²** | **6.65** (6.70 · 6.60) | 6.7 |  |" in page
    assert (
        "GRU of 64 units, states and actions joint, 300 batches of 2,000 trials (6M env steps); 250 · 250 processor seconds."
        in page
    )


def test_speeds_are_ratios() -> None:
    found = {
        "question": "Milliseconds.",
        "milliseconds": {"loop": 23.7, "ours": 2.35},
        "times_ours": {"loop": {"median": 10.11, "quartiles": [9.94, 10.23]}},
        "rounds": 30,
        "provenance": ABOUT,
    }
    page = render({"vmap": found})
    assert "| loop | 23.70 | 10.1 [9.9, 10.2] |" in page and "| ours | 2.35 |  |" in page
