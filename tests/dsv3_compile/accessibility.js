// What an accessibility checker asks of a page, as one expression: a list of complaints.
(() => {
  const found = [], say = (rule, element) => found.push(`${rule}: ${element.outerHTML.slice(0, 120)}`);
  const shown = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden" && !e.closest(".hidden, .skip, [aria-hidden=true]");
  const name = (e) => (e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.innerText || e.textContent || "").trim();

  if (!document.documentElement.lang) say("the page has no language", document.documentElement);
  if (!document.title) say("the page has no title", document.head);
  for (const landmark of ["header", "nav", "main", "footer"])
    if (document.querySelectorAll(landmark).length !== 1) say(`not exactly one <${landmark}>`, document.body);
  if (document.querySelectorAll("h1").length !== 1) say("not exactly one h1", document.body);
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    if (+heading.tagName[1] > level + 1) say(`heading after level ${level}`, heading);
    level = +heading.tagName[1];
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const e of document.querySelectorAll("[id]")) if (ids.filter((id) => id === e.id).length > 1) say("id used twice", e);
  for (const e of document.querySelectorAll("a, button, input, summary, [role=region], svg[role=img]")) if (!name(e)) say("without a name", e);
  for (const e of document.querySelectorAll("[aria-labelledby]"))
    if (!document.getElementById(e.getAttribute("aria-labelledby"))) say("label does not exist", e);
  for (const e of document.querySelectorAll("a")) {
    const target = e.getAttribute("href");
    if (!target) say("link that leads nowhere", e);
    else if (target.startsWith("#") && !target.startsWith("#/") && !document.getElementById(target.slice(1))) say("link to nothing", e);
  }
  for (const e of document.querySelectorAll("ul, ol")) for (const child of e.children) if (child.tagName !== "LI") say("list with something else inside", e);
  for (const table of document.querySelectorAll("table")) for (const th of table.querySelectorAll("th")) if (!th.scope) say("header cell without scope", th);
  for (const e of document.querySelectorAll("*")) {
    const style = getComputedStyle(e);
    const scrolls = (/auto|scroll/.test(style.overflowX) && e.scrollWidth > e.clientWidth + 1) || (/auto|scroll/.test(style.overflowY) && e.scrollHeight > e.clientHeight + 1);
    if (scrolls && e !== document.documentElement && e !== document.body && e.tabIndex < 0 && !e.querySelector("a, button")) say("scrolls, but not from the keyboard", e);
    if (e.tabIndex > 0) say("takes the focus out of order", e);
  }

  // Contrast of text against what is painted behind it (WCAG AA: 4.5, large text 3).
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const colour = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1); const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, under) => top.slice(0, 3).map((v, k) => v * top[3] + under[k] * (1 - top[3]));
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) {
      const own = colour(getComputedStyle(at).backgroundColor);
      layers.push(own);
      if (own[3] > 0.99) break;
    }
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ratio = (a, b) => { const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x); return (high + 0.05) / (low + 0.05); };
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (seen.has(e) || !walker.currentNode.data.trim() || !shown(e) || e.closest("script, style, noscript, svg")) continue;
    seen.add(e);
    const style = getComputedStyle(e), ground = behind(e), large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && +style.fontWeight >= 700);
    const found = ratio(over(colour(style.color), ground), ground);
    if (found < (large ? 3 : 4.5)) say(`contrast ${found.toFixed(2)}`, e);
  }
  return found.slice(0, 20);
})()
