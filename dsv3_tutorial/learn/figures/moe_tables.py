"""Printed and measured numbers of sparse models, as text."""

from dsv3_tutorial import paper, receipts


def loss_free() -> None:
    """Print the loss-free paper's table 2: an auxiliary loss against the bias."""
    print(f"{'quoted: arXiv 2408.15664':26}{'perplexity':>12}{'MaxVio':>8}")
    for size in ("1b", "3b"):
        for method, title in (("loss", "auxiliary loss"), ("bias", "bias")):
            row = {
                part: paper.row(f"loss_free.{size}.{method}.{part}").value
                for part in ("perplexity", "max_violation")
            }
            name = f"{size.upper()}, {title}"
            print(f"{name:26}{row['perplexity']:>12.2f}{row['max_violation']:>8.2f}")


def scope() -> None:
    """Print the V3 report's comparison of the scopes of balance, in validation loss."""
    print(f"\n{'quoted: V3 report, 4.5.3':26}{'1B':>12}{'3B':>8}")
    titles = {"sequence": "loss per sequence", "batch": "loss per batch", "bias": "bias"}
    for method, title in titles.items():
        cells = [paper.row(f"scope.{size}.{method}").value for size in ("1b", "3b")]
        print(f"{title:26}{cells[0]:>12.3f}{cells[1]:>8.3f}")


def checkpoint() -> None:
    """Print the trained checkpoint's held-out bits per byte beside counting and compressing."""
    found = receipts.latest("baselines")
    named = {r.shapes["by"]: r for r in found}
    print(f"{'held-out text of the library':46}{'bits per byte':>14}")
    for name in sorted(named, key=lambda by: -named[by].value):
        print(f"{name:46}{named[name].value:>14.3f}")
    print(receipts.caption(found))
