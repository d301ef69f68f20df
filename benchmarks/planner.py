"""The planner's predictions beside published training runs, as docs/planner.md has them.

python benchmarks/planner.py [--all]
"""

import sys
from statistics import median

from assay.plan.published import FOUNDRY, leave_one_out

misses, tables = [], {}
print("| machine | model | mesh | published | predicted | miss | source |")
print("|---|---|---|---|---|---|---|")
for row, _, predicted in leave_one_out():
    miss = predicted / row.tokens - 1
    misses.append(abs(miss))
    if row.source == FOUNDRY:
        tables.setdefault(row.where.chip.name, []).append(abs(miss))
        if abs(miss) <= 0.3 and "--all" not in sys.argv:
            continue
    axes = ((axis, size) for axis, size in row.mesh.model_dump().items() if size > 1)
    mesh = ", ".join(f"{axis} {size}" for axis, size in axes)
    print(
        f"| {row.where.name} | {row.name}, T {row.seq_len} | {mesh} | {row.tokens:,.0f} "
        f"| {predicted:,.0f} | {miss:+.1%} | {row.source} |"
    )
print("\n| llm-foundry's tables | rows | median miss | over 15 % | over 30 % | largest |")
print("|---|---|---|---|---|---|")
for chip, of in tables.items():
    print(
        f"| {chip} | {len(of)} | {median(of):.1%} | {sum(miss > 0.15 for miss in of)} "
        f"| {sum(miss > 0.3 for miss in of)} | {max(of):.1%} |"
    )
print(
    f"\n{len(misses)} rows: median miss {median(misses):.1%}, over 15 %: "
    f"{sum(miss > 0.15 for miss in misses)}, over 30 %: {sum(miss > 0.3 for miss in misses)}"
)
