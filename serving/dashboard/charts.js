// Line charts as SVG, with what they show in words for who cannot see them.

const LEAST_WIDTH = 200, HEIGHT = 120, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function round(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 100 ? String(Math.round(value)) : Number(value.toPrecision(3)).toString();
}

function time(atMs) {
  return new Date(atMs).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

/* Draw series [{name, points: [[x, value or null], …]}] into a figure; `axis` says how x reads. */
export function drawLines(figure, title, series, { unit = "", axis = time, fromZero = true } = {}) {
  const shown = series.map(({ name, points }) => ({ name, points: points.filter(([, value]) => value !== null) }));
  const all = shown.flatMap(({ points }) => points);
  const caption = document.createElement("figcaption");
  caption.textContent = unit ? `${title}, ${unit}` : title;
  if (!all.length) {
    caption.append(": nothing yet");
    figure.replaceChildren(caption);
    return;
  }
  const [first, last] = [Math.min(...all.map(([x]) => x)), Math.max(...all.map(([x]) => x))];
  const values = all.map(([, value]) => value), bottom = Math.min(fromZero ? 0 : Infinity, ...values);
  const top = Math.max(...values) > bottom ? Math.max(...values) : bottom + 1;
  const width = Math.max(figure.clientWidth, LEAST_WIDTH);
  const x = (at) => LEFT + ((at - first) / (last - first || 1)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
  const words = shown.filter(({ points }) => points.length)
    .map(({ name, points }) => `${name} ${round(points.at(-1)[1])}`).join(", ");
  const svg = element("svg", { width, height: HEIGHT, role: "img", "aria-label": `${title}: now ${words}` });
  for (const value of [bottom, (bottom + top) / 2, top]) {
    svg.append(
      element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, round(value)),
    );
  }
  for (const [at, anchor] of first === last ? [[first, "start"]] : [[first, "start"], [last, "end"]]) {
    svg.append(element("text", { x: x(at), y: HEIGHT - 4, "text-anchor": anchor }, axis(at)));
  }
  shown.forEach(({ name, points }, number) => {
    if (!points.length) return;
    const line = points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    svg.append(element("polyline", { class: `s${number % 4} line`, points: line }));
    const [at, value] = points.at(-1);
    svg.append(element("circle", { class: `s${number % 4}`, cx: x(at), cy: y(value), r: 2.5 }));
    const entry = document.createElement("span"), mark = document.createElement("i");
    entry.className = "legend";
    mark.className = `s${number % 4}`;
    entry.append(mark, `${name} ${round(value)}`);
    caption.append(entry);
  });
  figure.replaceChildren(caption, svg);
}
