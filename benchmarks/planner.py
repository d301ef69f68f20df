"""The planner's predictions beside published training runs, as docs/planner.md has them.

python benchmarks/planner.py
"""

from statistics import median

from assay.plan.published import leave_one_out

misses = []
print("| machine | model | published | predicted | miss | source |")
print("|---|---|---|---|---|---|")
for row, _, predicted in leave_one_out():
    miss = predicted / row.tokens - 1
    misses.append(abs(miss))
    print(
        f"| {row.where.name} | {row.name} | {row.tokens:,.0f} | {predicted:,.0f} "
        f"| {miss:+.1%} | {row.source} |"
    )
print(f"\nmedian miss {median(misses):.1%}, largest {max(misses):.1%}")
