// Two printed graphs side by side, or one under the other where there is no room.

const CONTEXT = 2;
const WORD = /\w+|\s+|[^\w\s]/g;
const TOKEN = /(#.*$)|("""[\s\S]*?"""|"[^"\n]*"|'[^'\n]*')|\b(def|return|class|import|from|if|else|elif|for|in|while|with|as|not|and|or|None|True|False|lambda)\b/gm;

// `del` lines move with every change and say nothing new.
function printed(text) {
  return text.split("\n").filter((line) => line.trim() && !line.trim().startsWith("del ")).map((line) => line.replace(/(\S) {2,}# /, "$1  # ").replace(/^ {4}/, "  "));
}

// The longest common subsequence as a list of [kind, left, right], kind one of " ", "-", "+".
function compared(left, right) {
  const rows = left.length, columns = right.length, best = [];
  for (let i = rows; i >= 0; i--) {
    best[i] = new Uint16Array(columns + 1);
    for (let j = columns - 1; i < rows && j >= 0; j--) {
      best[i][j] = left[i] === right[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const steps = [];
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && left[i] === right[j]) steps.push([" ", i++, j++]);
    else if (i < rows && (j === columns || best[i + 1][j] >= best[i][j + 1])) steps.push(["-", i++, null]);
    else steps.push(["+", null, j++]);
  }
  return steps;
}

// Hunks of changed lines stand beside each other; long stretches without a change become a gap.
function aligned(before, after, whole) {
  const steps = compared(before, after);
  const near = new Set();
  steps.forEach(([kind], k) => {
    if (kind !== " ") for (let m = k - CONTEXT; m <= k + CONTEXT; m++) near.add(m);
  });
  const rows = [];
  for (let k = 0; k < steps.length; ) {
    if (steps[k][0] === " ") {
      if (whole || near.has(k)) rows.push({ left: steps[k][1], right: steps[k][2] });
      else if (rows.length && rows[rows.length - 1].gap) rows[rows.length - 1].gap++;
      else rows.push({ gap: 1 });
      k++;
      continue;
    }
    const gone = [], come = [];
    for (; k < steps.length && steps[k][0] !== " "; k++) (steps[k][0] === "-" ? gone : come).push(steps[k]);
    for (const [left, right] of paired(gone.map((step) => step[1]), come.map((step) => step[2]), before, after)) rows.push({ changed: true, left, right });
  }
  return rows;
}

// Within a hunk, lines that say nearly the same stand beside each other: the pairing of the greatest likeness.
function paired(gone, come, before, after) {
  const words = (line) => new Set(line.match(/\w+/g));
  const left = gone.map((i) => words(before[i])), right = come.map((j) => words(after[j]));
  const alike = (a, b) => { let same = 0; for (const word of a) same += b.has(word); return same / Math.max(a.size, b.size, 1); };
  const best = Array.from({ length: gone.length + 1 }, () => new Float64Array(come.length + 1));
  const like = left.map((a) => right.map((b) => alike(a, b)));
  for (let i = gone.length - 1; i >= 0; i--) for (let j = come.length - 1; j >= 0; j--) {
    best[i][j] = Math.max(best[i + 1][j], best[i][j + 1], like[i][j] > 0.5 ? like[i][j] + best[i + 1][j + 1] : 0);
  }
  const pairs = [];
  for (let i = 0, j = 0; i < gone.length || j < come.length; ) {
    if (i < gone.length && j < come.length && like[i][j] > 0.5 && best[i][j] === like[i][j] + best[i + 1][j + 1]) pairs.push([gone[i++], come[j++]]);
    else if (j === come.length || (i < gone.length && best[i][j] === best[i + 1][j])) pairs.push([gone[i++], null]);
    else pairs.push([null, come[j++]]);
  }
  return pairs;
}

function coloured(line) {
  const parts = [];
  let at = 0;
  for (const match of line.matchAll(TOKEN)) {
    if (match.index > at) parts.push(line.slice(at, match.index));
    parts.push(h("span", { class: match[1] ? "c" : match[2] ? "s" : "k" }, match[0]));
    at = match.index + match[0].length;
  }
  parts.push(line.slice(at));
  return parts;
}

// Words that only this line has, marked; lines with little in common are left unmarked.
function marked(line, other) {
  if (other === null) return coloured(line);
  const mine = line.match(WORD) || [], theirs = other.match(WORD) || [];
  const kept = new Set(compared(mine, theirs).filter(([kind]) => kind === " ").map(([, i]) => i));
  const same = [...kept].reduce((sum, i) => sum + mine[i].trim().length, 0);
  if (same < 0.45 * line.replace(/\s/g, "").length) return coloured(line);
  return mine.map((word, i) => (kept.has(i) || !word.trim() ? word : h("mark", {}, word)));
}

function diffTable(before, after, { whole, split }) {
  const old = printed(before), fresh = printed(after);
  const table = h("table", { "aria-label": "The block's graph before and after the pass" });
  const cell = (lines, at, other, kind) =>
    at === null
      ? [h("td", { class: "n lost" }), h("td", { class: "lost" })]
      : [h("td", { class: `n ${kind}` }, String(at + 1)), h("td", { class: kind }, ...(kind ? marked(lines[at], other) : coloured(lines[at])))];
  const line = (sign, lines, at, other, kind) =>
    h("tr", {}, h("td", { class: `n ${kind}` }, String(at + 1)), h("td", { class: `sign ${kind}` }, sign), h("td", { class: kind }, ...(kind ? marked(lines[at], other) : coloured(lines[at]))));
  const body = h("tbody");
  if (split) {
    table.append(h("thead", { class: "hidden" }, h("tr", {}, ...["line", "before", "line", "after"].map((t) => h("th", { scope: "col" }, t)))));
    table.prepend(h("colgroup", {}, h("col", { style: "width:3.2rem" }), h("col"), h("col", { style: "width:3.2rem" }), h("col")));
  }
  if (!split) table.prepend(h("colgroup", {}, h("col", { style: "width:2.6rem" }), h("col", { style: "width:1.2rem" }), h("col")));
  let added = [];
  const flush = () => { body.append(...added); added = []; };
  for (const row of aligned(old, fresh, whole)) {
    if (row.gap || !row.changed) flush();
    if (row.gap) {
      const lines = `${row.gap} unchanged line${row.gap > 1 ? "s" : ""}`;
      body.append(h("tr", { class: "gap" }, h("td", { colspan: split ? 4 : 3 }, lines)));
      continue;
    }
    const left = row.left === null ? null : old[row.left], right = row.right === null ? null : fresh[row.right];
    if (split) {
      body.append(h("tr", {}, ...cell(old, row.left, row.changed ? right : null, row.changed ? "del" : ""), ...cell(fresh, row.right, row.changed ? left : null, row.changed ? "add" : "")));
    } else if (!row.changed) {
      body.append(line(" ", old, row.left, null, ""));
    } else {
      if (row.left !== null) body.append(line("−", old, row.left, right, "del"));
      if (row.right !== null) added.push(line("+", fresh, row.right, left, "add"));
    }
  }
  flush();
  table.append(body);
  return h("div", { class: split ? "diff split" : "diff", tabindex: 0, role: "region", "aria-label": "Difference" }, table);
}

function codeBlock(text, label) {
  return h("pre", { class: "source", tabindex: 0, role: "region", "aria-label": label }, ...text.split(/(?<=\n)/).flatMap(coloured));
}
