// A block's graph as a drawing: views are melted into edges, weights and sizes left out, changes coloured.

const NODE_WIDTH = 132, NODE_HEIGHT = 32, GAP_X = 14, GAP_Y = 26;

// Nodes of one snapshot that the other does not have, by name and op.
function onlyHere(here, there) {
  const known = new Set(there.nodes.map((n) => `${n.name} ${n.op}`));
  return new Set(here.nodes.filter((n) => !known.has(`${n.name} ${n.op}`)).map((n) => n.name));
}

function clip(text, length) {
  return text.length > length ? text.slice(0, length - 1) + "…" : text;
}

function graphDrawing(snapshot, different, kind, label, pick) {
  const px = (x) => x * (NODE_WIDTH + GAP_X) + NODE_WIDTH / 2 + 6, py = (y) => y * (NODE_HEIGHT + GAP_Y) + NODE_HEIGHT / 2 + 6;
  const points = Object.values(snapshot.at);
  const right = Math.max(...points.map(([x]) => x), ...snapshot.edges.flatMap(([, , path]) => path.map(([x]) => x)), 0);
  const bottom = Math.max(...points.map(([, y]) => y), 0);
  const width = px(right) + NODE_WIDTH / 2 + 6, height = py(bottom) + NODE_HEIGHT / 2 + 6;
  const svg = s("svg", { style: `width:100%;height:auto;min-width:${0.72 * width}px;max-width:${width}px`, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const [source, target, path] of snapshot.edges) {
    const hot = different.has(source) || different.has(target);
    svg.append(s("path", { d: curve(path.map(([x, y]) => [px(x), py(y)])), class: hot ? "hot" : null, "data-edge": `${source} ${target}` }));
  }
  const nodes = new Map(snapshot.nodes.map((n) => [n.name, n]));
  for (const [name, [x, y]] of Object.entries(snapshot.at)) {
    const node = nodes.get(name);
    const classes = ["node", node.role, different.has(name) ? kind : "", node.output ? "output" : ""].join(" ");
    const shape = node.value.replace(/^\w+ /, "");
    svg.append(s("g", { class: classes, transform: `translate(${px(x) - NODE_WIDTH / 2} ${py(y) - NODE_HEIGHT / 2})`, "data-node": name, onclick: () => pick(node) },
      s("rect", { width: NODE_WIDTH, height: NODE_HEIGHT, rx: 6 }),
      s("text", { x: NODE_WIDTH / 2, y: 14, "text-anchor": "middle" }, clip(node.role ? name : node.op.replace("dsv3.", ""), 19)),
      s("text", { x: NODE_WIDTH / 2, y: 26, "text-anchor": "middle", class: "shape" }, clip(shape, 24)),
      s("title", {}, described(node))));
  }
  return svg;
}

// Down through the waypoints, leaving and entering vertically.
function curve(path) {
  const ends = path.map(([x, y], k) => [x, y + (k === 0 ? NODE_HEIGHT / 2 : k === path.length - 1 ? -NODE_HEIGHT / 2 : 0)]);
  let d = `M${ends[0][0]} ${ends[0][1]}`;
  for (let k = 1; k < ends.length; k++) {
    const [ax, ay] = ends[k - 1], [bx, by] = ends[k], middle = (ay + by) / 2;
    d += `C${ax} ${middle} ${bx} ${middle} ${bx} ${by}`;
  }
  return d;
}

function described(node) {
  const parts = [`${node.name} = ${node.op}`, node.value];
  if (node.flops) parts.push(amount(node.flops, "FLOP"));
  if (node.bytes) parts.push(amount(node.bytes, "B"));
  if (node.source) parts.push(node.source);
  return parts.filter(Boolean).join(" · ");
}

// Before and after; `near` holds smaller drawings of only what is close to the changes, where there are any.
function drawings(before, after, near) {
  const note = h("p", { class: "soft mono", "aria-live": "polite" }, "Select a node to see its shape, cost and model line.");
  const place = h("div");
  const pick = (node) => {
    note.textContent = described(node);
    for (const group of place.querySelectorAll("g.node")) group.classList.toggle("picked", group.dataset.node === node.name);
  };
  const gone = onlyHere(before, after), come = onlyHere(after, before);
  const seen = (snapshot, different) => Object.keys(snapshot.at).filter((name) => different.has(name)).length;
  const one = (snapshot, different, kind, title) => h("figure", { style: "margin:0;min-width:0" },
    h("figcaption", { class: "soft" }, title),
    h("div", { class: "drawing", tabindex: 0, role: "region", "aria-label": title }, graphDrawing(snapshot, different, kind, title, pick)));
  const draw = (whole) => {
    const [left, right] = whole ? [before, after] : [{ ...before, ...near[0] }, { ...after, ...near[1] }];
    place.replaceChildren(before === after ? one(before, new Set(), "", "The pass left the graph as it was") : h("div", { class: "two" },
      one(left, gone, "gone", `Before: ${plural(seen(before, gone), "node")} will go`),
      one(right, come, "new", `After: ${plural(seen(after, come), "node")} ${seen(after, come) === 1 ? "is" : "are"} new`)));
    place.querySelectorAll(".drawing").forEach(scrollToChange);
  };
  const tools = h("div", { class: "tools" }, h("h4", {}, "The graph"));
  if (near) {
    const toggle = h("button", { type: "button", "aria-pressed": "false", onclick: () => { const whole = toggle.getAttribute("aria-pressed") === "false"; toggle.setAttribute("aria-pressed", String(whole)); draw(whole); } }, "whole graph");
    tools.append(h("div", { class: "group" }, toggle));
  }
  requestAnimationFrame(() => draw(!near));
  return [tools, place, h("ul", { class: "legend" }, key("var(--bad)", "removed"), key("var(--good)", "added"), key("var(--warm)", "cache"), key("var(--ink)", "output"), h("li", {}, "Views, sizes and weights are left out.")), note];
}

function key(colour, text) {
  return h("li", {}, h("i", { style: `border-color:${colour};border-width:2px` }), text);
}

// Bring the first change into sight.
function scrollToChange(drawing) {
  const first = drawing.querySelector(".gone, .new");
  if (!first) return;
  const frame = drawing.getBoundingClientRect(), at = first.getBoundingClientRect();
  drawing.scrollTo(Math.max(0, at.left - frame.left - frame.width / 2), Math.max(0, at.top - frame.top - 90));
}
