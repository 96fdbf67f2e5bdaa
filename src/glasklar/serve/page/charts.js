// Line charts in SVG: thin lines for every step, thick ones smoothed, a legend where there are several.

import { draw, make } from './dom.js';
import { number, share } from './i18n.js';

const WIDTH = 440, HEIGHT = 190, LEFT = 40, BOTTOM = 22, TOP = 10, RIGHT = 8;
const COLOURS = ['var(--c1)', 'var(--c2)', 'var(--c3)', 'var(--c4)'];

const MOST = 600; // points a line; more than the width has pixels is only work

// series: [{name, points: [[x, y, part], …], smooth}], smoothed within a part, never across; options: {title, percent, zero, label, top}
export function chart(series, options) {
  const all = series.flatMap((one) => one.points);
  const figure = make('figure', {}, make('figcaption', { textContent: options.title }));
  if (all.length === 0) return figure;
  const scale = scales(all, options);
  const svg = draw('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': spoken(series, options) });
  axes(svg, scale, options);
  series.forEach((one, k) => {
    const colour = COLOURS[k % COLOURS.length];
    if (one.smooth) svg.append(line(one.points, scale, colour, 'faint'));
    svg.append(line(one.smooth ? smoothed(one.points) : one.points, scale, colour, 'trace'));
  });
  figure.append(svg);
  if (series.length > 1) figure.append(legend(series));
  return figure;
}

function scales(points, { percent, zero, top }) {
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const low = percent || zero ? 0 : Math.min(...ys);
  const high = percent ? 1 : Math.max(top ?? 0, Math.min(Math.max(...ys), quantile(ys, 0.99) * 1.15));
  const first = Math.min(...xs), last = Math.max(...xs, first + 1);
  return {
    low, high, first, last,
    x: (value) => LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT),
    y: (value) => HEIGHT - BOTTOM - (Math.min(value, high) - low) / (high - low || 1) * (HEIGHT - BOTTOM - TOP),
  };
}

function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(q * (sorted.length - 1))];
}

function axes(svg, scale, { percent, label }) {
  for (let k = 0; k <= 4; k += 1) {
    const value = scale.low + k / 4 * (scale.high - scale.low), y = scale.y(value);
    svg.append(draw('line', { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: 'grid' }));
    const text = percent ? share.format(value) : number.format(value);
    svg.append(draw('text', { x: LEFT - 6, y: y + 4, 'text-anchor': 'end' }, text));
  }
  svg.append(draw('text', { x: LEFT, y: HEIGHT - 5 }, number.format(scale.first)));
  const end = `${number.format(scale.last)} ${label ?? ''}`;
  svg.append(draw('text', { x: WIDTH - RIGHT, y: HEIGHT - 5, 'text-anchor': 'end' }, end));
}

function line(points, scale, colour, kind) {
  const d = thinned(points).map(([x, y], k) => `${k ? 'L' : 'M'}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join('');
  return draw('path', { d, class: kind, stroke: colour });
}

function thinned(points) {
  const every = Math.ceil(points.length / MOST);
  return points.filter((_, k) => k % every === 0 || k === points.length - 1);
}

function smoothed(points) {
  const keep = 1 - 1 / Math.max(1, Math.min(20, points.length / 15));
  let sum = 0, weight = 0, current;
  return points.map(([x, y, part]) => {
    if (part !== current) [sum, weight, current] = [0, 0, part];
    sum = keep * sum + y;
    weight = keep * weight + 1;
    return [x, sum / weight];
  });
}

function legend(series) {
  const box = make('div', { className: 'legend' });
  series.forEach((one, k) => {
    const swatch = make('i');
    swatch.style.background = COLOURS[k % COLOURS.length];
    box.append(make('span', {}, swatch, one.name));
  });
  return box;
}

function spoken(series, { title, percent }) {
  const last = series.filter((one) => one.points.length).map((one) => {
    const value = one.points.at(-1)[1];
    return `${one.name} ${percent ? share.format(value) : number.format(value)}`;
  });
  return `${title}: ${last.join(', ')}`;
}
