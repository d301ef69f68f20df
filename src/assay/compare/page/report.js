"use strict";
// Draws the page's figures from the data in it. No figure changes a number; smoothing, if any, is
// said in the figure itself.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x"];
  const dashes = ["solid", "dash", "dashdot", "dot"];
  const colour = (i) => data.colours[i % data.colours.length];
  const dash = (i) => dashes[Math.floor(i / data.colours.length) % dashes.length];
  // Plotly reads a little HTML in its texts; names have none.
  const text = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (hex, alpha) => {
    const n = parseInt(hex.slice(1), 16);
    return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${alpha})`;
  };
  const phone = matchMedia("(max-width: 640px)"), narrow = () => phone.matches;
  const config = () => ({ responsive: true, displaylogo: false, plotlyServerURL: "",
    displayModeBar: narrow() ? false : undefined,  // fingers zoom without buttons
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });

  function layout(more) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true,
      linecolor: css("--line"), ticks: "outside", tickcolor: css("--line") };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      margin: { l: 60, r: 16, t: 28, b: 48 }, hovermode: "closest",
      hoverlabel: { namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--text") },
      legend: narrow() ? { orientation: "h", y: -0.25 } : {},
    };
    const out = Object.assign(base, more);
    for (const key of Object.keys(out))
      if (/^[xy]axis/.test(key)) out[key] = Object.assign({}, axis, out[key]);
    return out;
  }

  // As `smooth` in curves.py: an exponential moving average that begins unbiased.
  function smooth(y, weight) {
    let total = 0, count = 0;
    return y.map((v) => {
      if (v !== null) { total = weight * total + v; count = weight * count + 1; }
      return count ? total / count : null;
    });
  }
  const declared = (weight) => weight > 0
    ? [{ text: `smoothed: moving average, weight ${weight.toFixed(2)}`, showarrow: false,
         xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "bottom",
         font: { size: 12, color: css("--bad") } }]
    : [];

  const painters = [];
  const paint = (id, make) => {
    const element = at(id);
    if (!element) return;
    const draw = () => { const [traces, shape] = make(); Plotly.react(element, traces, layout(shape), config()); };
    painters.push(draw);
    draw();
    return draw;
  };
  const listen = (draw, ...ids) => ids.forEach((id) => at(id).addEventListener("input", draw));
  const weight = () => {
    const w = Number(at("smoothing").value);
    at("smoothing-shown").textContent = w > 0 ? w.toFixed(2) : "none";
    return w;
  };

  // A first fall from a random model would flatten all that matters: begin below it.
  // Bands are shown as far down as the means are spread: those of 2 seeds would flatten them too.
  function range(values, edges, log) {
    const late = values.filter((v) => v !== null && isFinite(v));
    if (!late.length) return undefined;
    const low = Math.min(...late), high = Math.max(...late), gap = high - low || Math.abs(high) || 1;
    const bottom = Math.max(Math.min(low, ...edges.filter((v) => v !== null)), low - gap);
    const ends = [bottom - 0.05 * gap, high + 0.2 * gap];
    return log ? [Math.log10(Math.max(ends[0], low / 2)), Math.log10(ends[1])] : ends;
  }

  if (at("curves")) {
    const draw = paint("curves", () => {
      const curve = data.curves[Number(at("kind").value)], axis = at("axis").value, w = weight();
      const logX = at("log-x").checked, logY = at("log-y").checked;
      const traces = [], late = [], edges = [], named = new Set();  // rungs share a legend entry
      curve.series.forEach((series) => {
        const band = series.axes[axis];
        if (!band) return;
        const c = colour(series.colour), few = band.x.length <= 30;
        const mean = smooth(band.mean, w);
        const start = band.x[0] + 0.1 * (band.x[band.x.length - 1] - band.x[0]);
        mean.forEach((v, i) => { if (band.x[i] >= start) late.push(v); });
        if (at("bands").checked && band.low[0] !== null) {
          const low = smooth(band.low, w), high = smooth(band.high, w);
          low.forEach((v, i) => { if (band.x[i] >= start) edges.push(v); });
          traces.push({ x: band.x.concat([...band.x].reverse()), y: high.concat([...low].reverse()),
            fill: "toself", fillcolor: faded(c, 0.18), line: { width: 0 }, mode: "lines",
            hoverinfo: "skip", showlegend: false, legendgroup: series.variant });
        }
        traces.push({ x: band.x, y: mean, name: text(series.variant), legendgroup: series.variant,
          showlegend: !named.has(series.variant),
          mode: few ? "lines+markers" : "lines", line: { color: c, width: 2, dash: dash(series.colour) },
          marker: { symbol: symbols[series.colour % symbols.length], size: 6 },
          hovertemplate: `%{y:.4f} at %{x:.4s}<extra>${text(series.name)}, ${band.n} seeds</extra>` });
        named.add(series.variant);
      });
      return [traces, { annotations: declared(w), hovermode: narrow() ? "closest" : "x",
        xaxis: { title: { text: data.axes[axis] }, type: logX ? "log" : "linear", exponentformat: "SI" },
        yaxis: { title: { text: curve.label }, type: logY ? "log" : "linear",
          range: range(late, edges, logY) } }];
    });
    listen(draw, "kind", "axis", "log-x", "log-y", "bands", "smoothing");
  }

  if (at("series")) {
    const draw = paint("series", () => {
      const w = weight(), logX = at("log-x").checked, logY = at("log-y").checked;
      const traces = data.series.map((run, i) => ({ x: run.x, y: smooth(run.y, w), name: text(run.name),
        mode: "lines", line: { color: colour(i), width: 1.8, dash: dash(i) } }));
      // The raw index above: ticks at round rows, placed where those rows are.
      const rows = new Map();
      data.series.forEach((run) => run.index.forEach((row, i) => rows.set(row, run.x[i])));
      const all = [...rows.keys()].sort((a, b) => a - b), last = all[all.length - 1];
      const step = Math.max(1, Number((last / 8).toPrecision(1)));
      const ticks = all.filter((row) => row % step === 0);
      traces.push({ x: ticks.map((r) => rows.get(r)), y: ticks.map(() => null), xaxis: "x2",
        hoverinfo: "skip", showlegend: false, mode: "markers" });
      const kind = logX ? "log" : "linear";
      return [traces, { annotations: declared(w), margin: { l: 60, r: 16, t: 64, b: 48 },
        xaxis: { title: { text: text(data.x_label) }, type: kind },
        xaxis2: { title: { text: "raw index" }, type: kind, overlaying: "x", matches: "x", side: "top",
          tickvals: ticks.map((r) => rows.get(r)), ticktext: ticks.map(String), showgrid: false },
        yaxis: { title: { text: "loss" }, type: logY ? "log" : "linear" } }];
    });
    listen(draw, "log-x", "log-y", "smoothing");
  }

  const verdictColour = (v) => ({ better: css("--accent"), worse: css("--bad"),
    equivalent: css("--good") }[v] || css("--soft"));

  if (at("forest")) {
    at("forest").style.minHeight = `${120 + 44 * data.pairs.length}px`;
    at("forest").style.height = at("forest").style.minHeight;
    paint("forest", () => {
      const reach = data.reach;
      const traces = [];
      data.pairs.forEach((p, i) => {
        const c = verdictColour(p.verdict);
        const ends = (e) => [e[0] === null ? -3 * reach : e[0], e[1] === null ? 3 * reach : e[1]];
        for (const [interval, width, name] of [[p.anytime95, 1.6, "anytime-valid"], [p.ci95, 6, "planned-n"]])
          traces.push({ x: ends(interval), y: [i, i], mode: "lines", showlegend: false, opacity: 0.85,
            line: { color: c, width },
            hovertemplate: `${name} 95 %: ${interval.map((v) => v === null ? "∞" : v.toFixed(4)).join(" to ")}<extra></extra>` });
        const [low, high] = ends(p.anytime95), beyond = [];  // an arrow where it goes on
        const open = (end) => end === null ? "" : "-open";
        if (low < -reach) beyond.push([-reach, `triangle-left${open(p.anytime95[0])}`]);
        if (high > reach) beyond.push([reach, `triangle-right${open(p.anytime95[1])}`]);
        traces.push({ x: beyond.map(([x]) => x), y: beyond.map(() => i), mode: "markers", showlegend: false,
          cliponaxis: false, hoverinfo: "skip", marker: { color: c, size: 9, symbol: beyond.map(([, s]) => s) } });
        if (p.difference !== null)
          traces.push({ x: [p.difference], y: [i], mode: "markers", showlegend: false,
            marker: { color: c, size: 10, line: { color: css("--back"), width: 2 } },
            hovertemplate: `${text(p.a)} less ${text(p.b)}: ${p.difference.toFixed(4)}, ${p.verdict}<extra></extra>` });
      });
      const shapes = [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: css("--text"), width: 1 } }];
      if (data.margin) shapes.push({ type: "rect", x0: -data.margin, x1: data.margin, yref: "paper",
        y0: 0, y1: 1, fillcolor: css("--soft"), opacity: 0.18, line: { width: 0 }, layer: "below" });
      const label = (p) => narrow() ? `${text(p.a)}<br>− ${text(p.b)}` : `${text(p.a)} less ${text(p.b)}: ${p.verdict}`;
      return [traces, { shapes,
        xaxis: { title: { text: `difference in ${data.unit}` }, range: [-reach, reach], zeroline: false },
        yaxis: { tickvals: data.pairs.map((_, i) => i), ticktext: data.pairs.map(label),
          range: [data.pairs.length - 0.4, -0.6], showgrid: false, zeroline: false } }];
    });
  }

  for (const [cost, label] of Object.entries(data.costs || {})) {
    paint(`pareto-${cost}`, () => {
      const rows = data.rows.filter((r) => r.mean !== null && r[cost] !== null);
      const ladder = rows.some((r) => r.rung !== null), named = new Set();
      const first = (r) => ladder && !named.has(r.variant) && named.add(r.variant) !== undefined;
      const traces = rows.map((r) => ({ x: [r[cost]], y: [r.mean], name: text(r.variant), mode: "markers",
        marker: { color: colour(r.colour), size: 10, symbol: symbols[r.colour % symbols.length] },
        error_y: r.ci95[0] === null ? undefined : { type: "data", symmetric: false,
          array: [r.ci95[1] - r.mean], arrayminus: [r.mean - r.ci95[0]], thickness: 1.2, color: colour(r.colour) },
        showlegend: first(r), legendgroup: r.variant, hovertemplate: `${text(r.name)}<br>%{x:.4s} ${label}<br>%{y:.4f} bits per byte<extra></extra>` }));
      const front = rows.filter((r) => !rows.some((o) => o[cost] <= r[cost] && o.mean <= r.mean &&
        (o[cost] < r[cost] || o.mean < r.mean))).sort((a, b) => a[cost] - b[cost]);
      traces.unshift({ x: front.map((r) => r[cost]), y: front.map((r) => r.mean), mode: "lines",
        line: { shape: "hv", dash: "dash", width: 1, color: css("--soft") }, hoverinfo: "skip", showlegend: false });
      const byMean = [...rows].sort((a, b) => a.mean - b.mean);  // neighbours' names lie apart
      const names = ladder ? [] : rows.map((r) => ({ x: r[cost], y: r.mean, text: text(r.name), showarrow: false,
        xanchor: "left", xshift: 8, yshift: byMean.indexOf(r) % 2 ? 9 : -9, font: { size: 11 } }));
      const costs = rows.map((r) => r[cost]), low = Math.min(...costs), high = Math.max(...costs);
      const alike = high < 1.02 * low;  // equal by design: no axis of last digits
      return [traces, { annotations: names, margin: { l: 60, r: 50, t: narrow() ? 12 : 30, b: 44 },
        xaxis: { title: { text: label }, exponentformat: "SI", rangemode: "normal", nticks: alike ? 3 : 6,
          range: alike ? [0.9 * low, 1.1 * high] : undefined, tickangle: 0 },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        yaxis: { title: { text: data.unit }, nticks: 6 } }];
    });
  }

  (data.experts || []).forEach((experts, n) => {
    const layers = experts.load.length, element = at(`experts-${n}`);
    if (!element) return;
    element.style.minHeight = "0";
    paint(`experts-${n}`, () => {
      const columns = Math.min(narrow() ? 1 : 4, layers), rows = Math.ceil(layers / columns);
      element.style.height = `${60 + 190 * rows}px`;
      const traces = [], shape = { grid: { rows, columns, pattern: "independent", xgap: 0.3, ygap: 0.35 }, annotations: [] };
      experts.load.forEach((load, i) => {
        const s = i ? String(i + 1) : "";
        traces.push({ type: "heatmap", z: load, x: experts.steps, xaxis: `x${s}`, yaxis: `y${s}`,
          zmin: 0, zmid: 1, zmax: 2, colorscale: [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]], showscale: i === 0,
          colorbar: { title: { text: "load" }, thickness: 12 },
          hovertemplate: `layer ${i}, expert %{y}, step %{x}: %{z:.2f} of the mean<extra></extra>` });
        shape[`xaxis${s}`] = { title: { text: i >= layers - columns ? "step" : "" }, showgrid: false };
        shape[`yaxis${s}`] = { title: { text: `layer ${i}: expert` }, dtick: Math.ceil(load.length / 8), showgrid: false };
      });
      return [traces, shape];
    });
  });

  if (at("scaling")) paint("scaling", () => {
    const traces = [];
    Object.entries(data.scaling.fits).forEach(([name, fit], i) => {
      const c = colour(i), curve = fit.curve;
      traces.push({ x: curve.flops.concat([...curve.flops].reverse()),
        y: curve.high.concat([...curve.low].reverse()), fill: "toself", fillcolor: faded(c, 0.15),
        line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: name });
      traces.push({ x: curve.flops, y: curve.loss, mode: "lines", name: text(name), legendgroup: name,
        line: { color: c, width: 2, dash: dash(i) } });
      traces.push({ x: fit.points.flops, y: fit.points.losses, mode: "markers", showlegend: false,
        legendgroup: name, marker: { color: c, size: 7, symbol: symbols[i % symbols.length] } });
    });
    const target = data.scaling.outlook && data.scaling.outlook.flops;
    const shapes = target ? [{ type: "line", x0: target, x1: target, yref: "paper", y0: 0, y1: 1,
      line: { color: css("--soft"), dash: "dot" } }] : [];
    const annotations = target ? [{ x: Math.log10(target), y: 1, yref: "paper", text: "target",
      showarrow: false, xanchor: "right", yanchor: "bottom" }] : [];
    return [traces, { shapes, annotations,
      xaxis: { title: { text: "training FLOPs" }, type: "log", exponentformat: "power" },
      yaxis: { title: { text: `held-out ${data.unit}` } } }];
  });

  if (at("isoflops")) paint("isoflops", () => {
    const traces = [];
    Object.entries(data.scaling.fits).forEach(([name, fit], i) => {
      const c = colour(i), { params, flops, losses } = fit.points;
      traces.push({ x: params, y: losses, mode: "markers", showlegend: false, legendgroup: name,
        marker: { color: c, size: 6, opacity: 0.6, symbol: symbols[i % symbols.length] },
        text: flops.map((f) => f.toExponential(2)),
        hovertemplate: `%{y:.4f} at %{x:.4s} parameters, %{text} FLOPs<extra>${text(name)}</extra>` });
      (fit.isoflops ? fit.isoflops.parabolas : []).forEach((p, n) => {
        const sizes = params.filter((_, k) => Math.abs(Math.log(flops[k] / p.flops)) < 0.1);
        const low = Math.min(...sizes), ratio = Math.max(...sizes) / low;
        const x = Array.from({ length: 60 }, (_, k) => low * ratio ** (k / 59));
        traces.push({ x, y: x.map((v) => p.loss + p.curvature * Math.log(v / p.params) ** 2),
          mode: "lines", name: text(name), legendgroup: name, showlegend: n === 0,
          line: { color: c, width: 2, dash: dash(i) }, hoverinfo: "skip" });
        if (p.inside) traces.push({ x: [p.params], y: [p.loss], mode: "markers", showlegend: false,
          legendgroup: name, marker: { color: c, size: 12, symbol: "diamond", line: { color: css("--back"), width: 2 } },
          hovertemplate: `least %{y:.4f} at %{x:.4s} parameters, ${p.flops.toExponential(2)} FLOPs<extra>${text(name)}</extra>` });
      });
    });
    return [traces, { xaxis: { title: { text: "active parameters" }, type: "log", exponentformat: "SI" },
      yaxis: { title: { text: `held-out ${data.unit}` } } }];
  });

  const repaint = () => painters.forEach((draw) => draw());
  at("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  phone.addEventListener("change", repaint);
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    repaint();
  });
  addEventListener("afterprint", () => {
    if (before) document.documentElement.dataset.theme = before;
    else delete document.documentElement.dataset.theme;
    repaint();
  });
})();
