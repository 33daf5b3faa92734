// Small pieces that everything draws with, and the two charts: the phase plan and the roofline.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// Three digits and a prefix, as in the terminal: 1.23 M.
function short(number) {
  for (const prefix of ["", "k", "M", "G", "T", "P"]) {
    if (number < 999.5 || prefix === "P") return `${+number.toPrecision(3)} ${prefix}`.trim();
    number /= 1000;
  }
}
// With a unit: 32 B, 1.23 MFLOP.
const amount = (number, unit) => { const text = short(number); return /[a-zA-Z]$/.test(text) ? text + unit : `${text} ${unit}`; };
function duration(seconds) {
  for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) if (seconds >= size) return `${+(seconds / size).toPrecision(3)} ${unit}`;
  return `${+(seconds / 1e-9).toPrecision(3)} ns`;
}
const plural = (count, word, many) => `${count} ${count === 1 ? word : many || word + "s"}`;

const log = (value) => Math.log10(value);
function decades(low, high) {
  const found = [];
  for (let e = Math.ceil(log(low) - 1e-9); e <= log(high) + 1e-9; e++) found.push(10 ** e);
  return found;
}

function frame(width, height, xs, ys, { xText, yText, xName, yName, label }) {
  const left = 74, right = 20, top = 16, bottom = 50;
  const x = (v) => left + ((log(v) - log(xs[0])) / (log(xs[1]) - log(xs[0]))) * (width - left - right);
  const y = (v) => height - bottom - ((log(v) - log(ys[0])) / (log(ys[1]) - log(ys[0]))) * (height - top - bottom);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": label });
  for (const v of decades(...xs)) svg.append(
    s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: height - bottom }),
    s("text", { class: "tick", x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, xText(v)));
  for (const v of decades(...ys)) svg.append(
    s("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
    s("text", { class: "tick", x: left - 8, y: y(v) + 4, "text-anchor": "end" }, yText(v)));
  svg.append(
    s("text", { class: "soft", x: (left + width - right) / 2, y: height - 10, "text-anchor": "middle" }, xName),
    s("text", { class: "soft", x: 14, y: (top + height - bottom) / 2, transform: `rotate(-90 14 ${(top + height - bottom) / 2})`, "text-anchor": "middle" }, yName));
  return { svg, x, y, left, right: width - right, top, bottom: height - bottom };
}

const FORM_COLOUR = { expanded: "var(--warm)", absorbed: "var(--accent)", folded: "var(--grey)" };
const FORM_DASH = { expanded: null, absorbed: null, folded: "6 4" };

// One line per form over the number of queries, and where expanded overtakes absorbed.
function crossoverChart(plan, context, metric, width) {
  const curves = plan.curves.filter((curve) => curve.context === context);
  const values = curves.flatMap((curve) => curve[metric]);
  const count = curves[0][metric].length;
  const format = metric === "flops" ? short : duration;
  const box = frame(width, Math.max(300, Math.min(400, width * 0.5)), [1, Math.max(2, plan.queries[count - 1])], [Math.min(...values) * 0.7, Math.max(...values) * 1.4], {
    xText: (v) => String(v), yText: format, xName: "queries per context expansion", yName: metric === "flops" ? "FLOPs" : "least time",
    label: `Cost of the expanded, absorbed and folded form over the number of queries, for a context of ${context}`,
  });
  for (const curve of curves) {
    const points = curve[metric].map((v, k) => `${box.x(plan.queries[k])},${box.y(v)}`).join(" ");
    box.svg.append(s("polyline", { points, fill: "none", stroke: FORM_COLOUR[curve.form], "stroke-width": 2.5, "stroke-dasharray": FORM_DASH[curve.form] }));
  }
  const even = evenAt(plan, context, metric);
  if (even && even < plan.queries[count - 1]) {
    const cx = box.x(even), flip = cx > box.left + 150;
    box.svg.append(
      s("line", { x1: cx, x2: cx, y1: box.top, y2: box.bottom, stroke: "var(--ink)", "stroke-dasharray": "3 3" }),
      s("text", { x: cx + (flip ? -8 : 8), y: box.top + 34, "text-anchor": flip ? "end" : "start", style: "font-weight:650" }, `even at ${Math.round(even)} queries`),
      s("text", { class: "soft", x: cx - 8, y: box.top + 14, "text-anchor": "end" }, "absorb"),
      s("text", { class: "soft", x: cx + 8, y: box.top + 14 }, "expand"));
  }
  return box.svg;
}

// Where the two lines cross, between the sampled queries.
function evenAt(plan, context, metric) {
  const of = (form) => plan.curves.find((c) => c.context === context && c.form === form)[metric];
  const low = of("absorbed"), high = of("expanded");
  for (let k = 1; k < low.length; k++) {
    const a = log(high[k - 1] / low[k - 1]), b = log(high[k] / low[k]);
    if (a > 0 && b <= 0) return 10 ** (log(plan.queries[k - 1]) + (a / (a - b)) * (log(plan.queries[k]) - log(plan.queries[k - 1])));
  }
  return null;
}

function timed(node, machine) {
  const compute = node.flops / machine.flops_per_second, memory = node.bytes / machine.bytes_per_second;
  const launch = node.launches * machine.launch_seconds;
  const bound = launch > Math.max(compute, memory) ? "launch" : compute > memory ? "compute" : "memory";
  return { ...node, seconds: Math.max(compute, memory) + launch, bound, intensity: node.flops / Math.max(node.bytes, 1) };
}

// Every product and fused op at its arithmetic intensity, under the roof; the area is its share of the time.
function rooflineChart(nodes, before, machine, width) {
  const roof = (i) => Math.min(machine.flops_per_second, i * machine.bytes_per_second);
  const balance = machine.flops_per_second / machine.bytes_per_second;
  const shown = nodes.filter((n) => n.flops > 0), old = before.filter((n) => n.flops > 0);
  const all = [...shown, ...old].map((n) => n.intensity);
  const xs = [Math.min(0.1, ...all) * 0.6, Math.max(balance * 6, ...all.map((i) => i * 2))];
  const box = frame(width, Math.max(300, Math.min(430, width * 0.55)), xs, [roof(xs[0]) * 0.5, machine.flops_per_second * 2], {
    xText: (v) => String(+v.toPrecision(2)), yText: (v) => short(v), xName: "FLOPs per byte", yName: "attainable FLOP/s",
    label: `Roofline: ${shown.length} nodes with products; the machine is balanced at ${Math.round(balance)} FLOPs per byte`,
  });
  box.svg.append(
    s("polyline", { fill: "none", stroke: "var(--ink)", "stroke-width": 2, points: [xs[0], balance, xs[1]].map((i) => `${box.x(i)},${box.y(roof(i))}`).join(" ") }),
    s("line", { class: "axis", x1: box.x(balance), x2: box.x(balance), y1: box.y(roof(balance)), y2: box.bottom, "stroke-dasharray": "3 3" }),
    s("text", { class: "soft", x: box.x(balance) + 6, y: box.bottom - 8 }, `balance ${Math.round(balance)}`));
  const total = Math.max(nodes.reduce((sum, n) => sum + n.seconds, 0), before.reduce((sum, n) => sum + n.seconds, 0));
  const radius = (n) => 3 + 34 * Math.sqrt(n.seconds / total);
  for (const n of old) box.svg.append(s("circle", { cx: box.x(n.intensity), cy: box.y(roof(n.intensity)), r: radius(n), fill: "none", stroke: "var(--grey)", "stroke-dasharray": "3 3" }, s("title", {}, `before: ${n.name}, ${n.op}: ${duration(n.seconds)}`)));
  const order = [...shown].sort((a, b) => b.seconds - a.seconds);
  for (const n of order) box.svg.append(s("circle", { cx: box.x(n.intensity), cy: box.y(roof(n.intensity)), r: radius(n), fill: n.bound === "compute" ? "var(--accent)" : "var(--warm)", "fill-opacity": 0.55, stroke: n.bound === "compute" ? "var(--accent)" : "var(--warm)" }, s("title", {}, `${n.name}, ${n.op}: ${duration(n.seconds)}, ${n.bound} bound, ${n.source}`)));
  const taken = [];
  for (const n of order.slice(0, width < 520 ? 3 : 6)) {
    const cx = box.x(n.intensity), cy = box.y(roof(n.intensity)), flip = cx > (box.left + box.right) / 2;
    let ty = cy + 4 + (flip ? -radius(n) : radius(n));
    while (taken.some(([t, f]) => f === flip && Math.abs(t - ty) < 14)) ty += flip ? -14 : 14;
    if (ty < box.top + 8 || ty > box.bottom - 4) continue;
    taken.push([ty, flip]);
    box.svg.append(s("text", { x: cx + (flip ? -radius(n) - 6 : radius(n) + 6), y: ty, "text-anchor": flip ? "end" : "start" }, width < 520 ? n.op.replace("dsv3.", "") : nodeTitle(n)));
  }
  return box.svg;
}
