// One message: a question, or an answer with its thoughts, its facts and what can be done with it.

import { find, icon, iconButton, make, showMarkup } from './dom.js';
import { number, words } from './i18n.js';

const SHORT_THOUGHT = 600; // characters up to which a thought stays open when the answer is there

export class Turn {
  constructor(message, chat) {
    this.chat = chat;
    this.id = message.id;
    this.box = message.role === 'user' ? this.asked(message) : this.answered();
    this.box.tabIndex = -1;
  }

  // --- a question ---

  asked(message) {
    const files = message.files.map((file) => make('span', { className: 'file' }, icon('file'), file.name));
    this.text = make('div', { className: 'bubble', textContent: message.content });
    this.foot = make('div', { className: 'foot' });
    return make('article', { className: 'turn asked', 'aria-label': words.you }, ...files, message.content ? this.text : null, this.foot);
  }

  edit(message) {
    const field = make('textarea', { value: message.content, 'aria-label': words.edit });
    const save = make('button', { type: 'submit', className: 'strong', textContent: words.saveEdit });
    const cancel = make('button', { type: 'button', className: 'quiet', textContent: words.cancel });
    const form = make('form', { className: 'edit' }, field, make('div', { className: 'buttons' }, cancel, save));
    const end = () => { form.replaceWith(this.text); this.foot.hidden = false; this.foot.querySelector('button')?.focus(); };
    cancel.addEventListener('click', end);
    form.addEventListener('submit', async (event) => {
      event.preventDefault();
      if (field.value.trim() && await this.chat.edit(message, field.value.trim())) end();
    });
    form.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') end();
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    this.text.replaceWith(form);
    this.foot.hidden = true;
    field.style.height = `${Math.min(field.scrollHeight + 4, 320)}px`;
    field.focus();
  }

  // --- an answer ---

  answered() {
    this.summary = make('summary');
    this.thoughts = make('div', { className: 'marked' });
    this.fold = make('details', { className: 'thought', hidden: true, open: true }, this.summary, this.thoughts);
    this.summary.addEventListener('click', () => { this.chosen = true; });
    this.content = make('div', { className: 'marked answer' });
    this.note = make('p', { className: 'note', hidden: true });
    this.foot = make('div', { className: 'foot' });
    return make('article', { className: 'turn answered', 'aria-label': words.answered }, this.fold, this.content, this.note, this.foot);
  }

  update(message, siblings, last) {
    if (message.role === 'assistant') this.showAnswer(message);
    const running = message.state === 'running';
    this.box.classList.toggle('last', last);
    this.box.setAttribute('aria-busy', String(running));
    const key = [message.state, last, siblings.indexOf(message), siblings.length, message.facts.tokens].join();
    if (key === this.key) return;
    this.key = key;
    const facts = this.facts(message);
    const tools = running ? [] : message.role === 'user' ? this.questionTools(message) : this.answerTools(message);
    this.foot.replaceChildren(...this.versions(message, siblings), ...tools, ...(facts ? [facts] : []));
  }

  showAnswer(message) {
    const { facts, state } = message, running = state === 'running';
    this.box.classList.toggle('running', running);
    this.fold.hidden = !message.reasoning;
    if (message.reasoning) {
      const seconds = number.format(facts.thinking_seconds ?? 0), tokens = facts.reasoning_tokens ?? 0;
      const thinks = running && !message.content;
      this.summary.textContent = thinks ? words.thinkingFor(seconds, tokens) : words.thought(seconds, tokens);
      this.fold.classList.toggle('thinking', thinks);
      showMarkup(this.thoughts, message.reasoning_html, dress);
      if (!this.chosen && !thinks) this.fold.open = message.reasoning.length <= SHORT_THOUGHT;
    }
    showMarkup(this.content, message.html, dress);
    this.content.classList.toggle('waiting', running && !message.content && !message.reasoning);
    const nothing = state === 'done' && !message.content ? words.empty : '';
    const cut = state === 'done' && facts.finish === 'length' ? words.cut : '';
    const said = [words.states[state], message.error].filter(Boolean).join(': ') || nothing || cut;
    this.note.textContent = said;
    this.note.hidden = !said;
    this.note.classList.toggle('wrong', state === 'failed');
  }

  facts(message) {
    if (message.role !== 'assistant' || !message.facts.tokens) return null;
    const { tokens, tokens_per_second: speed } = message.facts;
    return make('span', { className: 'facts', textContent: words.facts(tokens, speed === null ? '–' : number.format(Math.round(speed))) });
  }

  questionTools(message) {
    return [copyButton(() => message.content, words.copy), iconButton('edit', words.edit, () => this.edit(message))];
  }

  answerTools(message) {
    const warm = Number(find('temperature').value) ? words.again : words.againWarm;
    const inside = iconButton('inside', words.inside, () => this.chat.inside.open(this.chat.id, message, inside), 'named');
    inside.append(make('span', { textContent: words.inside, 'aria-hidden': 'true' }));
    return [copyButton(() => message.content, words.copy), iconButton('again', warm, () => this.chat.again(message)), ...(message.facts.tokens ? [inside] : [])];
  }

  versions(message, siblings) {
    if (siblings.length < 2) return [];
    const at = siblings.findIndex((one) => one.id === message.id);
    const step = (sign, label, to) => {
      const button = iconButton(sign, label, () => this.chat.toVersion(siblings[to]));
      button.disabled = !siblings[to];
      return button;
    };
    const where = make('span', { textContent: `${at + 1}/${siblings.length}`, 'aria-label': words.branch(at + 1, siblings.length), role: 'img' });
    return [make('span', { className: 'versions' }, step('left', words.earlierBranch, at - 1), where, step('right', words.laterBranch, at + 1))];
  }

  focusVersions() {
    this.box.querySelector('.versions button:not(:disabled)')?.focus();
  }
}

// Code gets a line that names its language and copies it; wide tables scroll on their own.
function dress(element) {
  if (element.localName === 'table') return make('div', { className: 'wide-table', tabIndex: 0 }, element);
  if (element.localName !== 'pre') return element;
  const code = element.querySelector('code') ?? element;
  const language = [...code.classList].find((name) => name.startsWith('language-'))?.slice(9) ?? '';
  element.tabIndex = 0;
  return make('div', { className: 'code' }, make('div', { className: 'code-head' }, make('span', { textContent: language }), copyButton(() => code.textContent, words.copyCode)), element);
}

function copyButton(text, label) {
  const button = iconButton('copy', label, async () => {
    const done = await navigator.clipboard.writeText(text()).then(() => true, () => false);
    button.replaceChildren(icon(done ? 'done' : 'close'));
    find('spoken').textContent = done ? words.copied : words.notCopied;
    setTimeout(() => button.replaceChildren(icon('copy')), 1500);
  });
  return button;
}
