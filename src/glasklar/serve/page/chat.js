// Conversation: questions, thoughts and answers as they are made, and a look inside every token.

import { answer } from './api.js';
import { find, make } from './dom.js';
import { number, tenths, words } from './i18n.js';

const UNSURE = Math.log(0.6);
const STEPS = { ArrowLeft: -1, ArrowRight: 1 };

export class Chat {
  constructor() {
    this.model = null;
    this.singleTurn = false;
    this.messages = [];
    this.running = null;
    const form = find('ask'), question = find('question');
    form.addEventListener('submit', (event) => { event.preventDefault(); this.send(question.value); });
    question.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    question.addEventListener('input', grow);
    find('stop').addEventListener('click', () => this.running?.abort());
    const chips = find('examples').querySelector('.chips');
    for (const text of words.examples) {
      chips.append(make('button', { type: 'button', textContent: text, onclick: () => this.send(text) }));
    }
  }

  serve(model, singleTurn) {
    this.model = model;
    this.singleTurn = singleTurn;
  }

  send(text) {
    if (!text.trim() || this.running || !this.model) return;
    find('question').value = '';
    grow.call(find('question'));
    find('notice').replaceChildren();
    this.ask([...(this.singleTurn ? [] : this.messages), { role: 'user', content: text.trim() }]);
  }

  async ask(messages) {
    const turn = new Turn(messages.at(-1).content, () => {
      if (this.running) return;
      turn.remove();
      this.ask(messages);
    });
    this.running = new AbortController();
    this.busy(true);
    try {
      for await (const chunk of answer(this.body(messages), this.running.signal)) turn.take(chunk);
      this.messages = [...messages, { role: 'assistant', content: turn.content }];
    } catch (error) {
      turn.fail(...trouble(error));
    }
    turn.end();
    this.running = null;
    this.busy(false);
  }

  body(messages) {
    const thinking = find('thinking').value, seed = find('seed').valueAsNumber;
    return {
      model: this.model, messages, logprobs: true, top_logprobs: 5,
      temperature: Number(find('temperature').value), ...(Number.isNaN(seed) ? {} : { seed: Math.trunc(seed) }),
      ...(thinking === 'auto' ? {} : { thinking: { type: thinking } }),
    };
  }

  busy(now) {
    find('send').hidden = now;
    find('stop').hidden = !now;
    if (!now) find('question').focus({ preventScroll: true });
  }
}

// What to say of an error, and whether it is one: whoever pressed stop wanted it. `fetch` knows lost connections
// as TypeError, in words of the browser that help nobody.
function trouble(error) {
  if (error.name === 'AbortError') return [words.stopped, false];
  return [error instanceof TypeError ? words.lost : error.message, true];
}

function grow() {
  this.style.height = 'auto';
  this.style.height = `${this.scrollHeight + 2}px`;
}

// One question with its answer.
class Turn {
  constructor(question, again) {
    this.began = performance.now();
    this.content = '';
    this.reasoningTokens = 0;
    this.summary = make('summary', { textContent: words.thinkingNow });
    this.thoughtTokens = make('div', { className: 'tokens' });
    this.thought = make('details', { className: 'thought', open: true, hidden: true }, this.summary, this.thoughtTokens);
    this.answer = make('div', { className: 'answer' });
    this.foot = make('div', { className: 'foot' });
    this.again = again;
    const asked = make('p', { className: 'question', textContent: question });
    this.box = make('article', { className: 'turn' }, asked, this.thought, this.answer, this.foot);
    this.box.addEventListener('keydown', walk);
    find('log').append(this.box);
    find('spoken').textContent = words.thinkingNow;
    this.foot.scrollIntoView({ block: 'end' });
  }

  remove() {
    this.box.remove();
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    this.content += choice.delta.content ?? '';
    if (choice.delta.content && !this.thoughtEnded) this.closeThought();
    for (const entry of choice.logprobs?.reasoning_content ?? []) {
      this.thought.hidden = false;
      this.reasoningTokens += 1;
      this.thoughtTokens.append(...token(entry));
    }
    for (const entry of choice.logprobs?.content ?? []) this.answer.append(...token(entry));
    this.answer.scrollIntoView({ block: 'nearest' });
  }

  closeThought() {
    this.thoughtEnded = true;
    const seconds = number.format((performance.now() - this.began) / 1000);
    this.summary.textContent = words.thought(seconds, this.reasoningTokens);
  }

  fail(text, wrong) {
    this.failed = text;
    this.foot.append(make('span', { className: wrong ? 'wrong' : '', textContent: text }));
  }

  end() {
    if (!this.thoughtEnded) this.closeThought();
    // Whole characters in place of the pieces of bytes that tokens may be.
    if (this.answer.textContent.includes('\ufffd')) this.answer.textContent = this.content;
    if (!this.content && !this.failed) this.answer.append(make('span', { className: 'muted', textContent: words.empty }));
    const seconds = (performance.now() - this.began) / 1000;
    if (this.usage) {
      const tokens = this.usage.completion_tokens;
      this.foot.append(make('span', { textContent: words.facts(tokens, number.format(Math.round(tokens / seconds))) }));
    }
    if (this.finish) this.foot.append(make('span', { textContent: words.finish[this.finish] ?? this.finish }));
    const again = make('button', { type: 'button', className: 'again', textContent: words.again, onclick: this.again });
    this.foot.append(copyButton(() => this.content), again);
    // One stop of the Tab key for each run of tokens; the arrow keys go on from there.
    for (const run of [this.thoughtTokens, this.answer]) run.querySelector('.token')?.removeAttribute('tabindex');
    find('spoken').textContent = [this.content, this.failed].filter(Boolean).join(' · ') || words.empty;
    this.foot.scrollIntoView({ block: 'nearest' });
  }
}

function walk(event) {
  const step = STEPS[event.key];
  if (!step || !event.target.matches('.token')) return;
  const tokens = [...event.target.parentElement.querySelectorAll('.token')];
  const next = tokens[tokens.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function copyButton(text) {
  const button = make('button', { type: 'button', textContent: words.copy });
  button.addEventListener('click', async () => {
    const done = await navigator.clipboard.writeText(text()).then(() => true, () => false);
    button.textContent = done ? words.copied : words.notCopied;
    setTimeout(() => { button.textContent = words.copy; }, 1500);
  });
  return button;
}

// A button, and the line breaks that it ends with: inside of a button they would break nothing.
function token(entry) {
  const kind = entry.logprob < UNSURE ? 'token unsure' : 'token';
  const breaks = entry.token.match(/\n*$/)[0], text = entry.token.slice(0, entry.token.length - breaks.length);
  const button = make('button', { type: 'button', className: kind, tabIndex: -1, textContent: text || '↵' });
  button.addEventListener('click', () => lookInside(entry));
  return text ? [button, breaks] : [breakSign(button), breaks];
}

function breakSign(button) {
  button.classList.add('break');
  return button;
}

function lookInside(entry) {
  const entries = entry.top_logprobs.some((one) => one.token === entry.token) ? entry.top_logprobs : [...entry.top_logprobs, entry];
  const rows = entries.map((one) => {
    const bar = make('span'), probability = Math.exp(one.logprob);
    bar.style.width = `${Math.max(1, 100 * probability)}%`;
    const kind = one.token === entry.token ? 'choice taken' : 'choice';
    const name = make('code', { textContent: visible(one.token) });
    return make('div', { className: kind }, name, bar, make('em', { textContent: exact(probability) }));
  });
  find('inside-body').replaceChildren(make('p', { className: 'muted', textContent: words.insideText }), ...rows);
  find('inside').showModal();
}

const exact = (p) => (p < 0.0005 ? `< ${tenths.format(0.001)}` : tenths.format(p));
const visible = (text) => text.replaceAll('\n', '↵').replaceAll(' ', '␣');
