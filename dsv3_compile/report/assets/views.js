// The sections of the page, each built from the data.

const plainCost = [
  ["operations", (c) => c.at.flops, (v) => amount(v, "FLOP"), (c) => c.flops],
  ["bytes moved", (c) => c.at.bytes, (v) => amount(v, "B"), (c) => c.bytes],
  ["kernels", (c) => c.launches, String],
  ["weights", (c) => c.weight_bytes, (v) => amount(v, "B")],
  ["cache per token", (c) => c.cache_bytes_per_token, (v) => amount(v, "B")],
  ["least time", (c) => c.at.seconds, duration],
];
const route = (block, phase, pass) => `#/${block}/${phase}/${pass}`;
const sizes = (w) => `B=${w.batch} S=${w.queries} T=${w.context}`;

function heroView(data) {
  const { report } = data, layers = report.blocks.filter((b) => b.phase === "decode");
  const count = layers.reduce((sum, b) => sum + b.layers.length, 0);
  const kinds = layers.filter((b) => b.layers.length).map((b) => `${b.layers.length} × ${b.name}`).join(", ");
  return h("div", { class: "hero" },
    h("h1", {}, `How ${data.title} was compiled`),
    h("p", {}, `A ${report.model_type} model of ${plural(count, "layer")} (${kinds}), compiled to ${report.dtype} for ${report.target}. Layers of one kind share one graph, so each kind is shown once: in prefill, which reads a prompt, and in decode, which adds one token to every row. Costs are told in B, the rows of a batch, S, the query positions of a row, and T, the cached positions that they look back on.`));
}

function shortView(data) {
  const cards = data.answers.map((a) => h("article", { class: `panel card ${a.tone}` },
    h("h3", {}, a.question), h("p", {}, a.answer),
    a.lines.length > 3
      ? h("details", {}, h("summary", {}, `${a.lines.length} reasons`), h("ul", {}, ...a.lines.map((l) => h("li", {}, l))))
      : a.lines.length ? h("ul", {}, ...a.lines.map((l) => h("li", {}, l))) : null,
    a.place ? h("p", { class: "more" }, h("a", { href: route(...a.place) }, `See ${a.place[2]} on ${a.place[0]}, ${a.place[1]}`)) : null));
  return h("section", { id: "short", "aria-labelledby": "short-h" },
    h("h2", { id: "short-h" }, "In short"), h("div", { class: "cards" }, ...cards),
    h("div", { class: "panel", style: "margin-top:1rem" }, matrix(data)));
}

// Which pass fired where: the number of matches, or of candidates left alone.
function matrix(data) {
  const blocks = data.report.blocks, names = [...new Set(blocks.map((b) => b.name))];
  const cell = (block, row) => {
    const fired = row.matches.length, left = row.refusals.length;
    const text = fired ? String(fired) : left ? `${left} left` : "–";
    const label = `${row.id}, ${block.name} ${block.phase}: ${fired} matched, ${left} left alone`;
    return h("td", {}, h("a", { href: route(block.name, block.phase, row.id), class: fired ? "fired" : left ? "left" : null, "aria-label": label, title: label }, text));
  };
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Where each pass fired" }, h("table", { class: "matrix" },
    h("caption", {}, "Where each pass fired: matches, or candidates it left alone"),
    h("thead", {},
      h("tr", {}, h("td"), ...names.map((n) => h("th", { scope: "colgroup", colspan: blocks.filter((b) => b.name === n).length, style: "text-align:center" }, n))),
      h("tr", {}, h("th", { scope: "col", style: "text-align:left" }, "pass"), ...blocks.map((b) => h("th", { scope: "col" }, b.phase)))),
    h("tbody", {}, ...blocks[0].passes.map((pass, k) => h("tr", {}, h("th", { scope: "row" }, pass.id), ...blocks.map((b) => cell(b, b.passes[k])))))));
}

function timeline(block, current) {
  const times = block.passes.map((p) => p.cost_after.at.seconds), first = block.passes[0].cost_before.at.seconds;
  const high = Math.max(first, ...times), low = Math.min(first, ...times) * 0.7;
  const height = (v) => Math.max(3, 74 * (log(v / low) / log(high / low)));
  return h("ol", { class: "line", "aria-label": `Passes over ${block.name}, ${block.phase}, in order; the bar is the least time after the pass` },
    ...block.passes.map((p, k) => {
      const fired = p.matches.length, left = p.refusals.length;
      const did = fired ? plural(fired, "match", "matches") : left ? `${left} left` : "–";
      return h("li", {}, h("button", { type: "button", class: fired ? "fired" : left ? "left" : null, "aria-current": p === current ? "step" : null, title: `${p.id}: ${duration(times[k])} after it`, onclick: () => { location.hash = route(block.name, block.phase, p.id); } },
        h("span", { class: "bar", "aria-hidden": "true" }, h("i", { style: `height:${height(times[k])}px` })), h("span", { class: "name" }, p.id), h("span", { class: "did" }, did)));
    }));
}

function equality(c) {
  if (!c) return "not checked";
  return c.max_rel_error === 0 ? "bit for bit equal" : `equal to ${c.max_rel_error.toExponential(0)}`;
}

function certificateBadge(c) {
  if (!c) return h("span", { class: "badge bad" }, equality(c));
  const where = `${c.dtype}, ${Object.entries(c.sizes).map(([k, v]) => `${k}=${v}`).join(" ")}${c.proxy ? ", a twin at small sizes" : ""}`;
  return h("span", {}, h("span", { class: "badge good" }, equality(c)), h("span", { class: "soft" }, ` bound ${c.bound.toExponential(0)} · ${where}`));
}

function passView(data, block, pass) {
  const found = data.graphs[`${block.name} ${block.phase}`], at = block.passes.indexOf(pass);
  const before = found.snapshots[found.states[at]], after = found.snapshots[found.states[at + 1]];
  const list = (title, items, empty) => h("div", {}, h("h4", {}, title), items.length ? h("ul", { class: "items" }, ...items) : h("p", { class: "soft" }, empty));
  return h("div", { class: "stack", id: "pass" },
    h("div", { class: "panel stack" },
      h("h3", {}, pass.id, h("span", { class: "soft", style: "font-weight:400" }, ` on ${block.name}, ${block.phase}`)),
      h("pre", { class: "picture", tabindex: 0, role: "region", "aria-label": "What the pass does" }, data.pictures[pass.name] || pass.spec),
      h("dl", { class: "facts" },
        fact("certificate", certificateBadge(pass.certificate)), fact("all passes together", h("span", { class: block.certificate ? "badge good" : "badge bad" }, equality(block.certificate))), fact("nodes", pass.nodes_before === pass.nodes_after ? String(pass.nodes_after) : `${pass.nodes_before} → ${pass.nodes_after}`),
        fact("took", duration(pass.seconds)), fact("spec", h("code", {}, pass.spec))),
      h("div", { class: "two" },
        list(plural(pass.matches.length, "match", "matches"), pass.matches.map((m) => h("li", {}, h("code", {}, m))), "Nothing in this block looks like what the pass rewrites."),
        list(`${plural(pass.refusals.length, "candidate")} left alone`, pass.refusals.map((r) => h("li", {}, h("code", {}, r.node), r.source ? ` (${r.source})` : "", `: ${r.reason}`)), "No candidate was refused."))),
    h("div", { class: "panel" }, costTable(block, pass)),
    h("div", { class: "panel" }, ...diffPanel(before, after)),
    h("div", { class: "panel" }, ...drawings(before, after, found.near[at])));
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function costTable(block, pass) {
  const rows = plainCost.map(([name, value, format, symbolic]) => {
    const a = value(pass.cost_before), b = value(pass.cost_after), most = Math.max(a, b) || 1;
    const change = a === b ? h("span", { class: "soft" }, "same") : h("span", { class: b < a ? "less" : "more-cost" }, b === 0 ? "none left" : a === 0 ? "new" : b < a ? `${+(a / b).toPrecision(3)}× less` : `${+(b / a).toPrecision(3)}× more`);
    const bars = h("div", { class: "pair", "aria-hidden": "true" }, h("i", { style: `width:${(100 * a) / most}%` }), h("i", { style: `width:${(100 * b) / most}%` }));
    return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "num" }, format(a)), h("td", { class: "num" }, format(b)), h("td", {}, bars), h("td", { class: "num" }, change));
  });
  const symbolic = plainCost.filter((c) => c[3]).map(([name, , , s]) => h("p", {}, `${name}: `, h("code", {}, s(pass.cost_before)), pass.cost_before === pass.cost_after ? "" : h("span", {}, " → ", h("code", {}, s(pass.cost_after)))));
  return h("div", {},
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Costs" }, h("table", { class: "costs" }, h("caption", {}, `What the block costs before and after, at ${sizes(block.workload)}`),
      h("thead", {}, h("tr", {}, ...["", "before", "after", "", "change"].map((t, k) => (t ? h("th", { scope: "col", class: "num" }, t) : h("td"))))), h("tbody", {}, ...rows))),
    h("details", {}, h("summary", {}, "In B, S and T"), ...symbolic));
}

function diffPanel(before, after) {
  const wide = matchMedia("(min-width: 900px)");
  const place = h("div");
  const state = { whole: before === after };
  const show = () => place.replaceChildren(diffTable(before.text, after.text, { whole: state.whole, split: wide.matches && before !== after }));
  const toggle = h("button", { type: "button", "aria-pressed": String(state.whole), onclick: () => { state.whole = !state.whole; toggle.setAttribute("aria-pressed", String(state.whole)); show(); } }, "whole graph");
  wide.onchange = show;
  show();
  return [h("div", { class: "tools" }, h("h4", {}, before === after ? "The block as Python: unchanged" : "The block as Python, before and after"), before === after ? null : h("div", { class: "group" }, toggle)), place];
}

function planView(data) {
  const plans = data.report.phase_plans;
  const section = h("section", { id: "plan", "aria-labelledby": "plan-h" }, h("h2", { id: "plan-h" }, "The phase plan"),
    h("p", { class: "lead" }, "Attention over a latent can be multiplied out in three orders: expand keys and values for every cached position, absorb the up-projection into the query, or fold the two weights into one ahead of time. The cheapest depends on how many queries share one expansion of the context."));
  if (!plans.length) section.append(h("p", { class: "notice" }, "The attention of this model has one order only: there is no latent to expand."));
  plans.forEach((plan, k) => section.append(planPanel(data, plan, data.plan_words[k])));
  return section;
}

function planPanel(data, plan, words) {
  const contexts = [...new Set(plan.curves.map((c) => c.context))];
  const state = { context: contexts[contexts.length - 1], metric: "flops" };
  const chart = h("div");
  const draw = () => chart.replaceChildren(crossoverChart(plan, state.context, state.metric, Math.min(820, Math.max(340, chart.clientWidth || 780))));
  const choice = (label, name, options) => group(label, options, () => state[name], (value) => { state[name] = value; draw(); });
  const row = (f) => h("tr", {}, h("th", { scope: "row" }, h("span", { style: `color:${FORM_COLOUR[f.form]}` }, "■ "), f.form), h("td", {}, h("code", {}, f.flops)), h("td", { class: "num" }, amount(f.weight_bytes, "B")));
  requestAnimationFrame(draw);
  new ResizeObserver(draw).observe(chart);
  return h("div", { class: "panel stack" },
    h("p", { style: "font-size:1.08rem" }, words),
    h("div", { class: "tools" }, choice("Context", "context", contexts.map((c) => [c, `T = ${c.toLocaleString("en")}`])), choice("Measure", "metric", [["flops", "operations"], ["seconds", `least time on ${data.report.target}`]])),
    h("div", { class: "two" }, chart, h("div", { class: "stack" },
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Forms" }, h("table", {}, h("caption", {}, `What the forms do not share, in ${plan.blocks.join(" and ")}`), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "form"), h("th", { scope: "col" }, "FLOPs"), h("th", { scope: "col", class: "num" }, "layer's weights"))), h("tbody", {}, ...plan.forms.map(row)))),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Break even" }, h("table", {}, h("caption", {}, `Fewest queries for which expanding takes no longer on ${data.report.target}`), h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "rows B"), h("th", { scope: "col", class: "num" }, "context T"), h("th", { scope: "col", class: "num" }, "queries S"))), h("tbody", {}, ...plan.times.map((t) => h("tr", {}, h("td", { class: "num" }, t.batch), h("td", { class: "num" }, t.context.toLocaleString("en")), h("td", { class: "num" }, t.queries === null ? "never" : t.queries)))))))));
}

function group(label, options, current, choose) {
  const box = h("div", { class: "group", role: "group", "aria-label": label });
  const mark = () => [...box.children].forEach((b, k) => b.setAttribute("aria-pressed", String(options[k][0] === current())));
  box.append(...options.map(([value, text]) => h("button", { type: "button", onclick: () => { choose(value); mark(); } }, text)));
  mark();
  return box;
}

function rooflineView(data, block) {
  const { machine } = data.report, found = data.graphs[`${block.name} ${block.phase}`];
  const priced = (k) => found.snapshots[found.states[k]].nodes.map((n) => timed(n, machine)).filter((n) => n.seconds > 0);
  const after = priced(found.states.length - 1), before = priced(0);
  const total = after.reduce((sum, n) => sum + n.seconds, 0), most = [...after].sort((a, b) => b.seconds - a.seconds).slice(0, 14);
  const chart = h("div");
  const draw = () => chart.replaceChildren(rooflineChart(after, before, machine, Math.min(820, Math.max(340, chart.clientWidth || 780))));
  requestAnimationFrame(draw);
  new ResizeObserver(draw).observe(chart);
  return h("div", { class: "panel stack" },
    h("h3", {}, `${block.name}, ${block.phase}`, h("span", { class: "soft", style: "font-weight:400" }, ` at ${sizes(block.workload)}: at least ${duration(total)} on ${data.report.target}`)),
    h("div", { class: "two" }, h("div", {}, chart, h("ul", { class: "legend" }, key("var(--accent)", "bound by arithmetic"), key("var(--warm)", "bound by memory"), key("var(--grey)", "dashed: before the passes"), h("li", {}, "A bubble's area is its share of the time."))),
      h("div", {}, h("h4", { style: "margin-bottom:.5rem" }, "Where the time goes"), h("ul", { class: "bars" }, ...most.map((n) => h("li", { class: n.bound, title: described(n) }, h("code", {}, nodeTitle(n)), h("i", { style: `width:${(100 * n.seconds) / most[0].seconds}%` }), h("span", { class: "num" }, duration(n.seconds))))), h("ul", { class: "legend" }, key("var(--grey)", "bound by its launch")))));
}

// A name that begins with its op needs no op beside it.
function nodeTitle(node) {
  const op = node.op.replace("dsv3.", "");
  return node.name.startsWith(op) ? node.name : `${op} ${node.name}`;
}

function kernelsView(data) {
  const section = h("section", { id: "kernels", "aria-labelledby": "kernels-h" }, h("h2", { id: "kernels-h" }, "Kernels"));
  if (!data.kernels.length) {
    section.append(h("p", { class: "notice", style: "margin-top:1rem" }, `No kernels were emitted for ${data.report.target}: the ops run as their torch references, which Inductor turns into native code.`));
    return section;
  }
  section.append(h("p", { class: "lead" }, `${plural(data.kernels.length, "file")} of ordinary Triton, cut for the constants of this model. Each says which node runs it and which line of the model the node came from.`));
  for (const kernel of data.kernels) {
    const details = h("details", { ontoggle: () => { if (details.open && !details.querySelector("pre")) details.append(codeBlock(kernel.source, `Source of ${kernel.name}`)); } }, h("summary", {}, `Source, ${kernel.source.split("\n").length} lines`));
    section.append(h("article", { class: "panel kernel stack", id: `kernel-${kernel.name}` }, h("h3", {}, kernel.name), usesList(kernel), binaries(kernel), details));
  }
  return section;
}

function usesList(kernel) {
  return h("ul", { class: "items" }, ...kernel.uses.map((u) => h("li", {}, h("code", {}, u.node), ` in ${u.block}, ${u.phase}`, u.source ? `, from ${u.source}` : "")));
}

function binaries(kernel) {
  if (!kernel.binaries.length) return null;
  const names = [["registers", "registers"], ["shared_bytes", "shared memory"], ["stack_bytes", "stack (spills)"], ["num_warps", "warps"]];
  const constants = (b) => Object.entries(b.constants || {}).map(([k, v]) => `${k}=${v}`).join(" ");
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Machine code of ${kernel.name}` }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "machine code"), ...names.map(([, t]) => h("th", { scope: "col", class: "num" }, t)), h("th", { scope: "col" }, "constants"))),
    h("tbody", {}, ...kernel.binaries.map((b) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, b.kernel)), ...names.map(([k]) => h("td", { class: "num" }, b[k] === undefined ? "–" : k.endsWith("bytes") ? amount(b[k], "B") : String(b[k]))), h("td", {}, h("code", {}, constants(b))))))));
}
