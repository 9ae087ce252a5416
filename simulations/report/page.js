"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const AXES = {steps: "optimizer steps of a client", rounds: "rounds", seconds: "running time (s)",
    tokens: "tokens trained on, all clients", mb: "MB moved, both directions"};
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b98600", "#56b4e9", "#7a4fbf", "#5c646d"];
  const DARK = ["#56b4e9", "#ff8a4c", "#3fc79a", "#e39ac0", "#f0c040", "#8fd0f5", "#b79aef", "#a8b0b8"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const SHADES = {bottom: 0, network: 1, trunk: 2, top: 3, evaluation: 4, startup: 5};
  const PAPER = 685;  // CSS pixels between the margins of A4
  let axis = "steps", printing = false;

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const theme = () => printing
    ? {ink: "#000", soft: "#444", line: "#ccc", paper: "#fff", accent: "#0072b2", bad: "#c04a00", undone: "#e0a100", waiting: "#9aa2aa"}
    : {ink: css("--ink"), soft: css("--soft"), line: css("--line"), paper: css("--paper"), accent: css("--accent"),
      bad: css("--bad"), undone: css("--undone"), waiting: css("--waiting")};
  const colors = () => (dark.matches && !printing ? DARK : LIGHT);
  const color = i => colors()[i % colors().length];
  const dash = i => DASHES[Math.floor(i / colors().length) % DASHES.length];
  const esc = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = text => esc(text.length > 72 ? text.slice(0, 71) + "…" : text);
  const alpha = (hex, a) => `rgba(${[1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join(",")},${a})`;
  const perplexity = values => values.map(v => v === null ? null : Math.exp(Math.min(v, 700)));
  const last = values => values[values.length - 1];

  function layout(xtitle, ytitle, more = {}) {
    const t = theme();
    const line = {gridcolor: t.line, zerolinecolor: t.line, linecolor: t.line, automargin: true, title: {standoff: 12}};
    return {
      font: {family: "system-ui, sans-serif", size: 13, color: t.ink}, paper_bgcolor: t.paper, plot_bgcolor: t.paper,
      margin: {l: 56, r: 16, t: 16, b: 48}, height: 400, hovermode: "closest", showlegend: true,
      legend: {orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: {size: 12}, traceorder: "normal"},
      hoverlabel: {align: "left", namelength: -1},
      ...more,
      xaxis: {...line, title: {text: xtitle, standoff: 10, font: {size: 13}}, ...more.xaxis},
      yaxis: {...line, title: {text: ytitle, standoff: 10, font: {size: 13}}, ...more.yaxis},
    };
  }

  function line(curve, column, name, style, more = {}) {
    return {type: "scatter", mode: "lines", x: curve[axis], y: curve[column], name: short(name),
      line: {width: 2, ...style}, hovertemplate: `%{y:.4f}<br>${AXES[axis]}: %{x}<extra>${short(name)}</extra>`, ...more};
  }

  function lossTraces(turn) {
    const traces = [], settings = (data.comparison || {settings: []}).settings;
    const banded = settings.filter(s => s.band), many = data.runs.length > 1;
    const place = new Map();
    settings.forEach((s, i) => s.runs.forEach(index => place.set(index, i)));
    data.runs.forEach((run, i) => {
      const c = color(many ? (banded.length ? place.get(i) : i) : 0), d = dash(banded.length ? place.get(i) : i);
      const train = run.curves.train, held = run.curves.heldout;
      if (train.loss.length && data.runs.length <= 4 && !banded.length) {
        const s = many ? c : color(5);
        if (last(train.each) > 1 || train.loss.length > 80)
          traces.push(line(turn(train, "loss"), "y", many ? `${run.label}, training` : "training, as it is", {width: 1, color: alpha(s, .35)}, {showlegend: false, hoverinfo: "skip", hovertemplate: null}));
        traces.push(line(turn(train, "smooth"), "y", many ? `${run.label}, training` : "training, all clients", {width: 1.6, color: s, dash: many ? "dot" : "solid"}));
      }
      if (run.curves.central.loss.length && !banded.length)
        traces.push(line(turn(run.curves.central, "loss"), "y", many ? `${run.label}, the server's file` : "the server's own file", {width: 1.8, color: many ? c : color(2), dash: "dash"}, {mode: "lines+markers", marker: {size: 4}}));
      if (held.loss.length) {
        const faint = Boolean(banded.length && settings[place.get(i)].band);  // its mean is named
        traces.push(line(turn(held, "loss"), "y", many ? (faint ? run.label : `${run.label}, held-out`) : "held-out text, all clients",
          {width: faint ? 1 : 2.2, color: faint ? alpha(c, .45) : c, dash: faint ? "solid" : d},
          {mode: held.loss.length > 60 ? "lines" : "lines+markers", marker: {size: faint ? 3 : 6}, showlegend: !faint}));
      }
    });
    banded.forEach(s => {
      const i = settings.indexOf(s), c = color(i), low = turn(s.band, "low"), high = turn(s.band, "high");
      const edge = {line: {width: 0}, hoverinfo: "skip", hovertemplate: null, showlegend: false};
      traces.push(line(low, "y", s.setting, {}, edge));
      traces.push(line(high, "y", s.setting, {}, {...edge, fill: "tonexty", fillcolor: alpha(c, .18)}));
      traces.push(line(turn(s.band, "loss"), "y", `${s.setting.length > 44 ? s.setting.slice(0, 43) + "…" : s.setting} (mean ± sd of ${s.runs.length} seeds)`, {width: 2.6, color: c, dash: dash(i)}));
    });
    return traces;
  }

  const asLoss = (curve, column) => ({...curve, y: curve[column]});
  const asPerplexity = (curve, column) => ({...curve, y: perplexity(curve[column])});

  function perClient(run, curves, column) {
    const place = name => run.clients.place[run.clients.name.indexOf(name)];
    const names = Object.keys(curves).filter(name => curves[name].loss.length);
    const traces = names.map((name, i) => line(curves[name], column, place(name), {width: 1.8, color: color(i), dash: dash(i)},
      {mode: curves[name].loss.length < 30 ? "lines+markers" : "lines", marker: {size: 4}}));
    if (names.length <= 12) return traces;
    const ends = names.map(name => last(curves[name][column]));
    const best = ends.indexOf(Math.min(...ends)), worst = ends.indexOf(Math.max(...ends));
    traces.forEach((trace, i) => {
      trace.showlegend = i === best || i === worst;
      trace.line = {width: trace.showlegend ? 2.4 : 1, color: i === best ? color(0) : i === worst ? color(1) : alpha(theme().soft.length === 7 ? theme().soft : "#888888", .4)};
      if (trace.showlegend) trace.name += i === best ? " (lowest at its end)" : " (highest at its end)";
    });
    return traces.filter(t => !t.showlegend).concat(traces.filter(t => t.showlegend));
  }

  const bar = (x, y, name, c, unit) => ({type: "bar", x, y, name: esc(name), marker: {color: c}, hovertemplate: `%{y:.4~g} ${unit}<extra>${esc(name)}, %{x}</extra>`});

  function participation(run, element) {
    const t = theme(), p = run.participation, few = p.columns.length * p.clients.length <= 600;
    const codes = {"not asked": 0, answered: 1, missing: 2, undone: 3, waiting: 4}, marks = ["", "✓", "×", "↺", "…"];
    const z = p.outcomes.map(row => row.map(o => codes[o]));
    const shades = [t.paper, t.accent, t.bad, t.undone, t.waiting];
    const scale = shades.flatMap((c, i) => [[i / 5, c], [(i + 1) / 5, c]]);
    const text = p.outcomes.map((row, i) => row.map((o, j) => `${esc(p.clients[i])}, ${esc(p.columns[j])}: ${o}` + (p.reasons[i + "," + j] ? `<br>${esc(p.reasons[i + "," + j]).replace(/(.{60}\S*)\s/g, "$1<br>")}` : "")));
    const roomy = p.clients.length <= 12 ? 30 : p.clients.length <= 40 ? 18 : 13;
    const rowHeight = printing ? Math.min(roomy, 820 / p.clients.length) : roomy;  // one page
    const trace = {type: "heatmap", x: p.columns.map(esc), y: p.rows.map(esc), z, zmin: 0, zmax: 5, zauto: false, colorscale: scale, showscale: false, xgap: few ? 2 : 1, ygap: few ? 2 : 1,
      text, hovertemplate: "%{text}<extra></extra>"};
    const show = {height: p.clients.length * rowHeight + 110, showlegend: false, margin: {l: 40, r: 16, t: 8, b: 60}};
    const width = printing ? PAPER : element.clientWidth, crowded = p.columns.length * 62 > width;
    const step = Math.max(1, Math.ceil(p.columns.length * 22 / width));
    const ticks = p.columns.map((c, j) => j).filter(j => j % (crowded ? step : 1) === 0);
    const l = layout("round and attempt", "", {...show,
      xaxis: {type: "category", showgrid: false, tickangle: crowded ? -90 : 0, tickvals: ticks.map(j => esc(p.columns[j])), tickfont: {size: 11}},
      yaxis: {type: "category", showgrid: false, autorange: "reversed", tickmode: "linear", dtick: Math.ceil(8 / rowHeight), tickfont: {size: rowHeight < 10 ? 7 : rowHeight < 18 ? 9 : 12}}});
    if (few) l.annotations = p.outcomes.flatMap((row, i) => row.map((o, j) => ({x: j, y: i, text: marks[codes[o]], showarrow: false, font: {color: o === "undone" ? "#000" : t.paper, size: 12}}))).filter(a => a.text);
    return [[trace], l];
  }

  const charts = {
    "loss": () => [lossTraces(asLoss), layout(AXES[axis], "loss (nats per token)")],
    "perplexity": () => {
      const traces = lossTraces(asPerplexity), values = traces.flatMap(t => t.y.filter(v => v !== null));
      const narrow = Math.max(...values) < 4 * Math.min(...values);
      const scale = narrow ? {} : {type: "log", dtick: "D2", exponentformat: "none", tickformat: ",~g"};
      return [traces, layout(AXES[axis], narrow ? "perplexity" : "perplexity, logarithmic", {yaxis: scale})];
    },
    "clients": run => [perClient(run, run.curves.clients, "smooth"), layout(AXES[axis], "training loss, smoothed (nats per token)")],
    "clients-heldout": run => [perClient(run, run.curves.clients_heldout, "loss"), layout(AXES[axis], "held-out loss (nats per token)")],
    "traffic": run => [[bar(run.rounds.round, run.rounds.up, "up, to the server", color(0), "MB"), bar(run.rounds.round, run.rounds.down, "down, to the clients", color(1), "MB")],
      layout("round", "MB", {barmode: "group", height: 320, xaxis: {dtick: run.rounds.round.length <= 25 ? 1 : undefined}})],
    "traffic-clients": run => [[bar(run.clients.place.map(esc), run.clients.up, "up, to the server", color(0), "MB"), bar(run.clients.place.map(esc), run.clients.down, "down, to the client", color(1), "MB")],
      layout("client", "MB", {barmode: "group", height: 340, xaxis: {type: "category", showgrid: false, tickfont: {size: run.clients.name.length > 40 ? 9 : 12}}})],
    "time": run => [run.parts.filter(part => run.rounds[part].some(v => v > 0)).map(part => bar(run.rounds.round, run.rounds[part], ({rest: "the rest", startup: "start-up"})[part] || part, part === "rest" ? theme().waiting : color(SHADES[part]), "s")),
      layout("round", "seconds", {barmode: "stack", xaxis: {dtick: run.rounds.round.length <= 25 ? 1 : undefined}})],
    "memory": run => [Object.entries(run.memory).map(([name, values], i) => ({type: "scatter", mode: values.length > 60 ? "lines" : "lines+markers", x: run.rounds.round, y: values, name, line: {color: color(i), width: 2, dash: DASHES[i % 4]}, hovertemplate: `%{y:,.0f} MB<extra>${name}, round %{x}</extra>`})),
      layout("round", "MB", {height: 320, yaxis: {rangemode: "tozero"}, xaxis: {range: [run.rounds.round[0] - .3, last(run.rounds.round) + .3], dtick: run.rounds.round.length <= 25 ? 1 : undefined}})],
    "participation": participation,
  };
  const alongAxis = new Set(["loss", "perplexity", "clients", "clients-heldout"]);

  function draw(element) {
    const run = data.runs[element.dataset.run];
    const [traces, shape] = charts[element.dataset.chart](run, element);
    if (printing) shape.width = PAPER; else shape.autosize = true;
    if (!traces.length || traces.every(t => t.y.length === 0)) {
      element.textContent = "Nothing is on record for this figure."; element.style.minHeight = 0; return;
    }
    Plotly.react(element, traces, shape, {responsive: !printing, displayModeBar: false});
  }
  const all = only => document.querySelectorAll(".chart").forEach(e => { if (!only || only.has(e.dataset.chart)) draw(e); });

  document.querySelectorAll("input[name=axis]").forEach(input => input.addEventListener("change", () => { axis = input.value; all(alongAxis); }));
  dark.addEventListener("change", () => all());
  let opened = [];
  addEventListener("beforeprint", () => {
    if (printing) return;
    printing = true;
    opened = [...document.querySelectorAll("details:not([open]):not(.whole)")];
    opened.forEach(each => { each.open = true; });
    all();
  });
  addEventListener("afterprint", () => { printing = false; opened.forEach(each => { each.open = false; }); all(); });
  all();
})();
