"""What the demo shows: its table, its figure and its notes."""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

BLUE, ORANGE = "tab:blue", "tab:orange"


def table(report: dict[str, Any]) -> Table:
    """One row for each loss, with a line for each arm."""
    result = Table(title=f"Loss layer and training, {report['model']}", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("loss", no_wrap=True)
    result.add_column("arm", no_wrap=True)
    headers = ("peak\nMB", "time\nms", "gradient\nerror", "held-out\naccuracy", "diff. at\nstep 1", "largest\ndiff.")
    for header in headers:
        result.add_column(header, justify="right", no_wrap=True)
    for name, row in report["results"].items():
        arms = row["alignloss"], row["full_logits"]
        result.add_row(
            name.upper(),
            "alignloss\nfull logits",
            "\n".join(f"{arm['peak_bytes'] / 1e6:.1f}" for arm in arms),
            "\n".join(f"{arm['seconds'] * 1e3:.0f}" for arm in arms),
            "\n".join(f"{arm['gradient_error']:.1e}" for arm in arms),
            "\n".join(f"{arm['accuracy_before']:.0%} → {arm['accuracy_after']:.0%}" for arm in arms),
            f"{row['loss_difference']['step_1']:.1e}",
            f"{row['loss_difference']['largest']:.1e}",
        )
    return result


def weight_bytes(report: dict[str, Any]) -> int:
    return report["settings"]["vocabulary"] * report["settings"]["hidden_size"] * 4


def notes(report: dict[str, Any]) -> list[str]:
    """How to read the table."""
    settings, many = report["settings"], report["many_pairs"]
    return [
        f"Loss layer: hidden states to loss to gradients, for {settings['pairs_per_step']} pairs: "
        f"{settings['layer_tokens']} tokens, {settings['layer_completion_tokens']} of them in completions, vocabulary "
        f"{settings['vocabulary']}. Of its peak, {weight_bytes(report) / 1e6:.1f} MB are the gradient of the weight in "
        f"both arms. On {many['tokens']} tokens: {many['alignloss'] / 1e6:.0f} MB against "
        f"{many['full_logits'] / 1e6:.0f} MB.",
        "Gradient error: relative to float64, under the start weights. Diff.: of the training losses of the two arms, "
        "relative. Step 1 shows the error of both loss layers (DPO, IPO and KTO start from a constant); later steps "
        "add a drift, because Adam divides by gradients near zero and so amplifies the rounding of both arms.",
        f"Accuracy: share of {settings['held_out_pairs']} held-out pairs whose chosen completion has the higher "
        "implied reward, log pi / pi_ref (for CPO, which has no reference: log pi). A tie counts half; before training "
        "every implied reward is 0.",
    ]


def plot(report: dict[str, Any]) -> Figure:
    """Loss curves of both arms for each loss, and the peak memory of the loss layer."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: dict[str, Any] = figure.subplot_mosaic([["dpo", "ipo", "memory"], ["kto", "cpo", "memory"]])
    for name, row in report["results"].items():
        steps = range(1, len(row["alignloss"]["losses"]) + 1)
        axes[name].plot(steps, row["full_logits"]["losses"], color=ORANGE, lw=6, alpha=0.5, label="full logits")
        axes[name].plot(steps, row["alignloss"]["losses"], color=BLUE, lw=1.5, marker=".", label="alignloss")
        axes[name].set(title=name.upper(), xlabel="step", ylabel="nats$^2$" if name == "ipo" else "loss")
        axes[name].grid(alpha=0.3)
    axes["dpo"].legend()

    settings, many, memory = report["settings"], report["many_pairs"], axes["memory"]
    for offset, arm, color in ((-0.2, "alignloss", BLUE), (0.2, "full_logits", ORANGE)):
        peaks = [report["results"]["dpo"][arm]["peak_bytes"] / 1e6, many[arm] / 1e6]
        bars = memory.bar([offset, 1 + offset], peaks, 0.4, color=color, label=arm.replace("_", " "))
        memory.bar_label(bars, fmt="%.0f" if max(peaks) > 100 else "%.1f")
    memory.axhline(weight_bytes(report) / 1e6, color="black", ls="--", lw=1, label="gradient of the weight, in both")
    groups = [f"training batch\n{settings['layer_tokens']} tokens", f"larger batch\n{many['tokens']} tokens"]
    memory.set_xticks([0, 1], groups)
    memory.set(title="Peak memory of the DPO layer", ylabel="MB, forward and backward")
    memory.set_ylim(top=1.35 * max(many["alignloss"], many["full_logits"]) / 1e6)
    memory.legend(loc="upper left")
    figure.suptitle(f"alignloss against full logits: {report['model']}, same start weights, same batches")
    return figure
