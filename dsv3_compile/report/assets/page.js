// State, routing, search, theme and keys.

const data = JSON.parse(document.getElementById("data").textContent);
const { blocks } = data.report;
const state = { block: null, pass: null };

// The address of a pass within its block: a pass that ran again has a number behind its name.
for (const block of blocks) {
  const runs = {};
  for (const pass of block.passes) {
    runs[pass.name] = (runs[pass.name] || 0) + 1;
    pass.id = runs[pass.name] > 1 ? `${pass.name}-${runs[pass.name]}` : pass.name;
  }
}

const passes = h("section", { id: "passes", "aria-labelledby": "passes-h" }, h("h2", { id: "passes-h" }, "Pass by pass"),
  h("p", { class: "lead" }, "Every pass rewrites the graph of a block, and is certified by running the block before and after it. Bars show the least time the block takes after the pass, on a logarithmic scale; choose one to see what it did. Work on weights alone counts until hoist-weights moves it to where weights are bound."));
const chooser = h("div", { class: "choose" }), line = h("div"), detail = h("div");
passes.append(chooser, line, detail);
const roofline = h("section", { id: "roofline", "aria-labelledby": "roofline-h" }, h("h2", { id: "roofline-h" }, "Roofline"),
  h("p", { class: "lead" }, "What bounds each node of the finished graph: the memory on the slope, the arithmetic under the flat roof. Nodes without products, which only move bytes, are in the list alone."));
const roof = h("div", { class: "stack" });
roofline.append(roof);

function find(name, phase) { return blocks.find((b) => b.name === name && b.phase === phase); }
function go(block, pass) { location.hash = route(block.name, block.phase, pass.id); }

// What the address names, or the place where absorption shows.
function fromAddress() {
  const [, name, phase, id] = decodeURIComponent(location.hash).split("/");
  const block = find(name, phase);
  const pass = block && block.passes.find((p) => p.id === id);
  return pass ? { block, pass } : null;
}
function start() {
  const place = data.answers.map((a) => a.place).findLast((p) => p && p[1] === "decode") || [];
  const block = find(place[0], place[1]) || blocks[0];
  return { block, pass: block.passes.find((p) => p.id === place[2]) || block.passes[0] };
}

function show(next) {
  const moved = state.block !== next.block;
  Object.assign(state, next);
  const names = [...new Set(blocks.map((b) => b.name))];
  const choose = (name, phase) => { const block = find(name, phase) || blocks.find((b) => b.name === name); go(block, block.passes.find((p) => p.id === state.pass.id)); };
  const layers = (name) => { const b = blocks.find((x) => x.name === name); return b.layers.length > 1 ? `${name} × ${b.layers.length}` : name; };
  const focused = chooser.contains(document.activeElement) ? document.activeElement.textContent : null;
  chooser.replaceChildren(
    group("Block", names.map((n) => [n, layers(n)]), () => state.block.name, (n) => choose(n, state.block.phase)),
    group("Phase", blocks.filter((b) => b.name === state.block.name).map((b) => [b.phase, b.phase]), () => state.block.phase, (p) => choose(state.block.name, p)),
    h("span", { class: "soft" }, sizes(state.block.workload)));
  if (focused) [...chooser.querySelectorAll("button")].find((b) => b.textContent === focused)?.focus();
  const inLine = line.contains(document.activeElement);
  line.replaceChildren(timeline(state.block, state.pass));
  const current = line.querySelector("[aria-current]");
  current.parentElement.parentElement.scrollLeft = current.offsetLeft - 120;
  if (inLine) current.focus({ preventScroll: true });
  detail.replaceChildren(passView(data, state.block, state.pass));
  if (moved) roof.replaceChildren(rooflineView(data, state.block));
  document.title = `${state.pass.id} · ${state.block.name} ${state.block.phase} · ${data.title}`;
}

function step(by) {
  const { passes: all } = state.block, at = all.indexOf(state.pass) + by;
  if (all[at]) go(state.block, all[at]);
}
function turn(same, other) {
  const options = blocks.filter((b) => b[same] === state.block[same]);
  const next = options[(options.findIndex((b) => b[other] === state.block[other]) + 1) % options.length];
  go(next, next.passes.find((p) => p.id === state.pass.id));
}

// ---- search ----
const entries = [];
for (const block of blocks) for (const pass of block.passes) {
  const link = route(block.name, block.phase, pass.id), where = `${block.name} ${block.phase}`;
  entries.push([pass.id, `pass on ${where}`, link]);
  for (const m of pass.matches) entries.push([m, `match of ${pass.id}, ${where}`, link]);
  for (const r of pass.refusals) entries.push([`${r.node} ${r.source}: ${r.reason}`, `left alone by ${pass.id}, ${where}`, link]);
}
for (const [name, found] of Object.entries(data.graphs)) {
  const [block, phase] = name.split(" "), seen = new Set();
  found.states.slice(1).forEach((snapshot, k) => {
    for (const n of found.snapshots[snapshot].nodes) if (!n.view && !seen.has(n.name)) {
      seen.add(n.name);
      entries.push([`${n.name} = ${n.op} ${n.value} ${n.source}`, `node of ${name}, after ${find(block, phase).passes[k].id}`, route(block, phase, find(block, phase).passes[k].id)]);
    }
  });
}
for (const k of data.kernels) entries.push([`${k.name} ${k.uses.map((u) => u.source).join(" ")}`, "kernel", `#kernel-${k.name}`]);

const query = document.getElementById("query"), found = document.getElementById("found");
function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  found.hidden = !words.length;
  if (!words.length) return;
  const hits = entries.filter(([text, kind]) => words.every((w) => `${text} ${kind}`.toLowerCase().includes(w))).slice(0, 40);
  found.replaceChildren(...hits.map(([text, kind, link]) => h("li", {}, h("a", { href: link, onclick: () => { found.hidden = true; if (link === location.hash) passes.scrollIntoView(); } }, clip(text, 150), h("small", {}, kind)))));
  if (!hits.length) found.append(h("li", {}, h("p", { class: "soft" }, "Nothing found.")));
}
query.addEventListener("input", search);
query.addEventListener("focus", search);
document.querySelector(".search").addEventListener("keydown", (event) => {
  const links = [query, ...found.querySelectorAll("a")], at = links.indexOf(document.activeElement);
  if (event.key === "Escape") { found.hidden = true; query.blur(); }
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    links[Math.min(links.length - 1, Math.max(0, at + (event.key === "ArrowDown" ? 1 : -1)))].focus();
  }
  if (event.key === "Enter" && at === 0 && links[1]) links[1].click();
});
document.addEventListener("click", (event) => { if (!event.target.closest(".search")) found.hidden = true; });

// ---- theme ----
const theme = document.getElementById("theme");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === "dark" ? "☀" : "☾";
}
function flipTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(next);
  try { localStorage.setItem("dsv3c-theme", next); } catch { /* a page from disk may have no storage */ }
}
let stored = null;
try { stored = localStorage.getItem("dsv3c-theme"); } catch { /* as above */ }
const system = matchMedia("(prefers-color-scheme: dark)");
setTheme(stored || (system.matches ? "dark" : "light"));
if (!stored) system.addEventListener("change", () => setTheme(system.matches ? "dark" : "light"));
theme.addEventListener("click", flipTheme);

// ---- keys ----
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, .diff, .drawing, .scroll, pre")) return;
  const acts = { "/": () => query.focus(), ArrowRight: () => step(1), ArrowLeft: () => step(-1), t: flipTheme, p: () => turn("name", "phase"), b: () => turn("phase", "name") };
  if (!acts[event.key]) return;
  event.preventDefault();
  acts[event.key]();
});

window.addEventListener("hashchange", () => {
  const next = fromAddress();
  if (!next) return;
  const far = passes.getBoundingClientRect().bottom < 80 || passes.getBoundingClientRect().top > innerHeight * 0.7;
  show(next);
  if (far) passes.scrollIntoView();
});

const versions = Object.entries(data.versions).map(([k, v]) => `${k} ${v}`).join(" · ");
document.getElementById("made").textContent = versions;
document.getElementById("main").append(heroView(data), shortView(data), passes, planView(data), roofline, kernelsView(data));
show(fromAddress() || start());
if (fromAddress()) passes.scrollIntoView();
