// A look inside an answer: its facts, its tokens with what else they could have been, the experts that made them, and the
// training documents that hold the same words.

import * as api from './api.js';
import { draw, find, make } from './dom.js';
import { number, precise, share, tenths, words } from './i18n.js';

const SHORTEST = 15; // tokens that a trace needs
const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
const SHOWN = 8, CELL = 10, MOST_WIDTH = 640;

export class Inside {
  constructor() {
    this.dialog = find('inside');
    this.body = find('inside-body');
    this.dialog.addEventListener('click', (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener('close', () => this.opener?.focus());
  }

  async open(conversation, message, opener) {
    this.opener = opener;
    this.body.replaceChildren(facts(message), make('p', { className: 'muted', role: 'status', textContent: words.insideLoading }));
    this.dialog.showModal();
    let found;
    try {
      found = await api.inside(conversation, message.id);
    } catch (error) {
      this.body.lastChild.textContent = api.said(error);
      return;
    }
    this.found = found;
    this.detail = make('div', { className: 'detail', 'aria-live': 'polite' });
    this.body.replaceChildren(facts(message), make('p', { className: 'muted', textContent: words.insideHint }), this.tokens(), this.detail, ...this.source());
    const first = found.tokens.findIndex((token) => token.channel === 'content');
    this.choose(Math.max(0, first));
  }

  // --- tokens ---

  tokens() {
    this.buttons = this.found.tokens.map((token, k) => {
      const breaks = token.text.match(/\n*$/)[0], text = token.text.slice(0, token.text.length - breaks.length);
      const button = make('button', { type: 'button', className: `token ${token.channel}`, tabIndex: -1, textContent: text || (token.channel === 'special' ? token.text : '↵'), onclick: () => this.choose(k) });
      button.style.setProperty('--doubt', doubt(token.logprob).toFixed(2));
      button.setAttribute('aria-label', `${visible(token.text)}, ${words.probability(exact(Math.exp(token.logprob)))}`);
      return [button, breaks];
    });
    const box = make('div', { className: 'tokens', role: 'group', 'aria-label': words.inside }, ...this.buttons.flat());
    box.addEventListener('keydown', (event) => {
      const at = this.buttons.findIndex(([button]) => button === event.target) + (STEPS[event.key] ?? NaN);
      if (!this.buttons[at]) return;
      event.preventDefault();
      this.choose(at);
      this.buttons[at][0].focus();
    });
    return box;
  }

  choose(k) {
    this.buttons.forEach(([button], at) => {
      button.tabIndex = at === k ? 0 : -1;
      button.setAttribute('aria-pressed', String(at === k));
    });
    const token = this.found.tokens[k];
    this.detail.replaceChildren(this.alternatives(token), this.experts(token));
  }

  alternatives(token) {
    const known = token.alternatives.slice(0, SHOWN).some(([text]) => text === token.text);
    const entries = known ? token.alternatives.slice(0, SHOWN) : [...token.alternatives.slice(0, SHOWN - 1), [token.text, token.logprob]];
    const rows = entries.map(([text, logprob]) => {
      const bar = make('span'), probability = Math.exp(logprob), taken = text === token.text;
      bar.style.width = `${Math.max(0.8, 100 * probability)}%`;
      return make('li', { className: taken ? 'taken' : '' }, make('code', { textContent: visible(text) }), make('i', { 'aria-hidden': 'true' }, bar),
        make('em', { textContent: exact(probability) }), taken ? make('span', { className: 'unseen', textContent: words.taken }) : null);
    });
    return make('section', { className: 'alternatives' }, make('h3', { textContent: words.alternatives }), make('ol', {}, ...rows));
  }

  // --- experts: a strip for each layer, the whole answer above in grey, the token's own below in colour ---

  experts(token) {
    const { layers, experts, tokens } = this.found;
    if (!layers.length) return make('section', {}, make('p', { className: 'muted', textContent: words.noExperts }));
    this.usage ??= new WeakMap();
    if (!this.usage.has(this.found)) this.usage.set(this.found, layers.map((_, l) => usage(tokens, l, experts)));
    const strips = layers.map((layer, l) => {
      const name = make('span', { textContent: words.layer(layer + 1) });
      return make('div', { className: 'strip' }, name, strip(this.usage.get(this.found)[l], new Map(token.experts[l]), experts, layer));
    });
    const legend = make('p', { className: 'legend' }, make('i', { className: 'own' }), words.expertsOf, make('i', { className: 'all' }), words.expertsAll);
    return make('section', { className: 'experts' }, make('h3', { textContent: words.experts }), ...strips, legend);
  }

  // --- where the text comes from ---

  source() {
    if (!this.traces) return [];
    const box = make('div', { className: 'source', 'aria-live': 'polite' });
    const button = make('button', { type: 'button', className: 'quiet', textContent: words.source });
    button.addEventListener('click', async () => {
      button.disabled = true;
      box.replaceChildren(...await this.traced().catch((error) => [make('p', { className: 'note wrong', textContent: api.said(error) })]));
      button.disabled = false;
    });
    return [make('section', {}, button, box)];
  }

  async traced() {
    const plain = (text) => [make('p', { className: 'muted', textContent: text })];
    const ids = this.found.tokens.filter((token) => token.channel !== 'special').map((token) => token.id);
    if (ids.length < SHORTEST) return plain(words.sourceShort);
    const { overlaps } = await api.trace(ids);
    if (!overlaps.length) return plain(words.sourceNone);
    const rows = overlaps.slice(0, 20).map((overlap) => make('li', {},
      make('blockquote', {}, make('span', { className: 'muted', textContent: overlap.before ?? '' }), make('mark', { textContent: overlap.text }), make('span', { className: 'muted', textContent: overlap.after ?? '' })),
      make('p', { className: 'muted', textContent: [overlap.source, overlap.origin, words.sourceLicence(overlap.licence), words.sourceSteps(overlap.steps.length)].filter(Boolean).join(' · ') })));
    return [...plain(words.sourceLabel), make('ul', {}, ...rows)];
  }
}

function facts({ facts: f, settings }) {
  const pairs = [
    [words.fact.speed, f.tokens_per_second === null ? '–' : words.factSpeed(number.format(f.tokens_per_second))],
    [words.fact.tokens, words.factTokens(f.reasoning_tokens, f.tokens - f.reasoning_tokens)],
    [words.fact.first, words.seconds(precise.format(f.first))],
    [words.fact.seconds, words.seconds(precise.format(f.seconds))],
    [words.fact.cache, words.of(f.cached, f.prompt_tokens)],
    [words.fact.drafts, f.drafted ? words.of(f.accepted, f.drafted) : words.none],
    [words.fact.energy, words.energy(precise.format(f.joules)), words.energyHint],
    [words.fact.sampling, words.sampling(number.format(settings.temperature), settings.seed)],
  ];
  return make('dl', { className: 'facts-grid' }, ...pairs.map(([name, value, title = '']) => make('div', { title }, make('dt', { textContent: name }), make('dd', { textContent: value }))));
}

function usage(tokens, layer, experts) {
  const sums = new Array(experts).fill(0);
  for (const token of tokens) for (const [expert, weight] of token.experts[layer]) sums[expert] += weight / tokens.length;
  return sums;
}

function strip(all, own, experts, layer) {
  const width = Math.min(MOST_WIDTH, Math.max(experts * 36, 240)), cell = width / experts, gap = cell > 6 ? 2 : 0;
  const most = Math.max(...all) || 1;
  const said = [...own].map(([expert, weight]) => words.expert(expert + 1, share.format(weight))).join(', ');
  const svg = draw('svg', { viewBox: `0 0 ${width} ${2 * CELL + 12}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `${words.layer(layer + 1)}: ${said}` });
  all.forEach((sum, e) => {
    const mine = own.get(e) ?? 0, title = words.expert(e + 1, own.has(e) ? share.format(mine) : share.format(sum));
    const place = { x: e * cell + gap / 2, width: cell - gap, rx: gap };
    const above = draw('rect', { ...place, y: 0, height: CELL + 8, class: 'own', 'fill-opacity': own.has(e) ? (0.35 + 0.65 * mine).toFixed(2) : 0 });
    const frame = draw('rect', { ...place, y: 0, height: CELL + 8, class: 'empty' });
    const below = draw('rect', { ...place, y: CELL + 11, height: 6, class: 'all', 'fill-opacity': (sum / most).toFixed(2) });
    const hint = draw('title');
    hint.textContent = title;
    svg.append(draw('g', {}, hint, frame, above, below));
  });
  return svg;
}

// 0 for what the model was sure of, 1 for what it gave a hundredth or less.
const doubt = (logprob) => Math.min(1, Math.max(0, -logprob / 4.6));
const exact = (p) => (p < 0.0005 ? `< ${tenths.format(0.001)}` : tenths.format(p));
const visible = (text) => text.replaceAll('\n', '↵').replaceAll(' ', '␣');
