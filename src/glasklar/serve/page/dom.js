// Elements from plain data; all text goes through textContent. Marked-up text, which the server has sanitised, is built
// anew here from a list of what it may hold: what is not on the list leaves only its text.

const SVG = 'http://www.w3.org/2000/svg', MATH = 'http://www.w3.org/1998/Math/MathML', HTML = 'http://www.w3.org/1999/xhtml';

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'role') element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// --- icons: strokes on a field of 24 by 24 ---

const ICONS = {
  menu: 'M4 6h16M4 12h16M4 18h16', side: 'M5 5h14a1 1 0 0 1 1 1v12a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1V6a1 1 0 0 1 1-1zM9.5 5v14', plus: 'M12 5v14M5 12h14', search: 'M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zm5.2 12.2L20 20',
  more: 'M5 12h.01M12 12h.01M19 12h.01', copy: 'M9 9h10v11H9zM5 15V4h10', done: 'M5 13l4 4L19 7', close: 'M6 6l12 12M18 6L6 18',
  again: 'M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6', edit: 'M4 20h4L19 9l-4-4L4 16z', inside: 'M12 5C6.5 5 3 12 3 12s3.5 7 9 7 9-7 9-7-3.5-7-9-7zm0 4a3 3 0 1 0 0 6 3 3 0 0 0 0-6z',
  left: 'M15 6l-6 6 6 6', right: 'M9 6l6 6-6 6', send: 'M12 19V5M6 11l6-6 6 6', stop: 'M7 7h10v10H7z',
  file: 'M13 3H6v18h12V8zM13 3v5h5', clip: 'M20 11.5l-8.2 8.2a5 5 0 0 1-7.1-7.1l8.5-8.5a3.4 3.4 0 0 1 4.8 4.8l-8.5 8.5a1.7 1.7 0 0 1-2.4-2.4l7.8-7.8',
  tune: 'M4 7h10M18 7h2M4 17h2M10 17h10M14 4v6M8 14v6', trash: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13', save: 'M12 4v11M7 11l5 5 5-5M5 20h14',
  chart: 'M4 20V4M4 20h16M8 16l4-5 3 3 5-7', spark: 'M12 3v4M12 17v4M3 12h4M17 12h4M6 6l2.5 2.5M15.5 15.5L18 18M18 6l-2.5 2.5M8.5 15.5L6 18',
};

export function icon(name) {
  return draw('svg', { viewBox: '0 0 24 24', class: 'icon', 'aria-hidden': 'true' }, draw('path', { d: ICONS[name] }));
}

// A button that shows an icon and says its name to whoever cannot see it.
export function iconButton(name, label, onclick, className = '') {
  return make('button', { type: 'button', className: `tool ${className}`, title: label, 'aria-label': label, onclick }, icon(name));
}

// --- marked-up text ---

const TAGS = {
  [HTML]: new Set(['p', 'br', 'hr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'strong', 'em', 's', 'code', 'pre', 'blockquote',
    'ul', 'ol', 'li', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'a', 'span']),
  [MATH]: new Set(['math', 'mrow', 'mi', 'mn', 'mo', 'mtext', 'mspace', 'mfrac', 'msqrt', 'mroot', 'msub', 'msup', 'msubsup',
    'munder', 'mover', 'munderover', 'mtable', 'mtr', 'mtd', 'mstyle', 'mpadded', 'mphantom', 'menclose']),
};
const ATTRIBUTES = new Set(['title', 'start', 'display', 'mathvariant', 'stretchy', 'fence', 'form', 'separator', 'largeop',
  'movablelimits', 'linethickness', 'displaystyle', 'scriptlevel', 'width', 'accent', 'accentunder', 'notation', 'columnalign']);
const CLASS = /^(hl-[a-z0-9]+|language-[a-z]+|left|center|right)$/;
const ADDRESS = /^(https?:\/\/|mailto:)/i;

// The one place where text becomes HTML, and then only to be read.
const policy = window.trustedTypes?.createPolicy('glasklar', { createHTML: (html) => html });

// Shows sanitised HTML in `element`. What has not changed since the last time stays as it is, so that a growing answer
// keeps its selection and does not flicker.
export function showMarkup(element, html, dress) {
  const read = new DOMParser().parseFromString(policy ? policy.createHTML(html) : html, 'text/html'); // inert: runs and loads nothing
  const fresh = [...read.body.childNodes].map(rebuilt).filter((node) => node !== null);
  const old = [...element.childNodes];
  const same = fresh.findIndex((node, k) => !old[k]?.plain?.isEqualNode(node));
  const from = same < 0 ? fresh.length : same;
  for (const node of old.slice(from)) node.remove();
  for (const node of fresh.slice(from)) {
    const shown = node.cloneNode(true);
    const dressed = dress && shown.nodeType === Node.ELEMENT_NODE ? dress(shown) : shown;
    dressed.plain = node;
    element.append(dressed);
  }
}

function rebuilt(node) {
  if (node.nodeType === Node.TEXT_NODE) return document.createTextNode(node.data);
  if (node.nodeType !== Node.ELEMENT_NODE) return null;
  const children = [...node.childNodes].map(rebuilt).filter((child) => child !== null);
  const tag = node.localName;
  if (!TAGS[node.namespaceURI]?.has(tag)) {
    const rest = document.createElement('span');
    rest.append(...children);
    return rest;
  }
  const element = document.createElementNS(node.namespaceURI, tag);
  for (const { name, value } of node.attributes) {
    if (ATTRIBUTES.has(name)) element.setAttribute(name, value);
    if (name === 'class' && CLASS.test(value)) element.setAttribute('class', value);
  }
  if (tag === 'a' && ADDRESS.test(node.getAttribute('href') ?? '')) {
    element.href = node.getAttribute('href');
    element.target = '_blank';
    element.rel = 'noopener noreferrer nofollow';
    element.title = element.href; // where it leads, whatever its text says
  }
  element.append(...children);
  return element;
}
