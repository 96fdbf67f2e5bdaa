// A conversation: a tree of messages, of which one branch is shown. Answers are made on the server whether or not anybody
// looks; the page attaches to one that is being made, and detaches without ending it.

import * as api from './api.js';
import { Composer } from './composer.js';
import { find, make } from './dom.js';
import { words } from './i18n.js';
import { Inside } from './inside.js';
import { Turn } from './turn.js';

const NEAR = 120; // pixels from the end within which the view follows a growing answer

export class Chat {
  constructor(sidebar) {
    this.sidebar = sidebar;
    this.inside = new Inside();
    this.composer = new Composer((question) => this.send(question), () => this.stop());
    this.turns = new Map();
    this.clear();
    sidebar.renamed = (title) => this.entitle(title);
    for (const text of words.examples) {
      find('welcome').querySelector('.chips').append(make('button', { type: 'button', textContent: text, onclick: () => this.send({ content: text, files: [] }) }));
    }
  }

  serve(status, names) {
    this.model = status.model;
    this.inside.traces = status.tracing;
    const options = names.map((name) => make('option', { value: name, textContent: name, selected: name === status.model }));
    find('model').replaceChildren(...options);
    find('model').disabled = names.length < 2;
    this.singleTurn = status.single_turn;
    find('ask').title = status.single_turn ? words.singleTurn : '';
  }

  clear() {
    this.detach();
    this.id = null;
    this.messages = new Map();
    this.leaf = null;
    this.turns.clear();
    this.broken = false;
    this.say('');
  }

  entitle(text) {
    find('title').textContent = text;
    document.title = text === 'glasklar' ? `${this.model ?? ''} · glasklar` : `${text} · glasklar`;
  }

  async open(id) {
    if (id && id === this.id) { this.entitle(this.title); return; }
    this.clear();
    this.sidebar.mark(id);
    this.entitle('glasklar');
    this.show();
    find('question').focus({ preventScroll: true });
    if (!id) return;
    try {
      const tree = await api.conversation(id);
      if (location.hash !== `#/c/${id}`) return;
      this.id = id;
      this.title = tree.title;
      this.take(tree.messages);
      this.leaf = tree.leaf ?? tree.messages.at(-1)?.id ?? null;
      this.entitle(tree.title);
      this.show();
      this.toEnd();
      this.attach();
    } catch (error) {
      this.say(api.said(error));
    }
  }

  take(messages) {
    for (const message of messages) this.messages.set(message.id, message);
  }

  // --- the tree ---

  path() {
    const found = [];
    for (let at = this.messages.get(this.leaf); at; at = this.messages.get(at.parent)) found.unshift(at);
    return found;
  }

  siblings(message) {
    return [...this.messages.values()].filter((one) => one.parent === message.parent && one.role === message.role);
  }

  // To another version of a message, where it was last gone on with.
  async toVersion(message) {
    const below = new Set([message.id]);
    let leaf = message;
    for (const one of this.messages.values()) {
      if (!below.has(one.parent)) continue;
      below.add(one.id);
      if (one.created >= leaf.created) leaf = one;
    }
    this.leaf = leaf.id;
    this.show();
    this.turns.get(message.id)?.focusVersions();
    this.attach();
    await api.change(this.id, { leaf: leaf.id }).catch((error) => this.say(api.said(error)));
  }

  // --- showing ---

  show() {
    const path = this.path();
    find('welcome').hidden = path.length > 0 || Boolean(location.hash.startsWith('#/c/') && !this.id);
    const shown = path.map((message, k) => {
      const turn = this.turns.get(message.id) ?? new Turn(message, this);
      this.turns.set(message.id, turn);
      turn.update(message, this.siblings(message), k === path.length - 1);
      return turn.box;
    });
    const log = find('log'), gone = [...log.children].filter((child) => !shown.includes(child));
    for (const child of gone) child.remove();
    shown.forEach((box, k) => { if (log.children[k] !== box) log.insertBefore(box, log.children[k] ?? null); });
    this.composer.busy(path.at(-1)?.state === 'running');
  }

  say(text) {
    find('notice').textContent = text;
  }

  toEnd() {
    find('scroll').scrollTop = find('scroll').scrollHeight;
  }

  // --- asking ---

  async send({ content, files }, parent = this.path().at(-1)?.id ?? null) {
    if (this.composer.isBusy || !this.model) return false;
    this.say('');
    this.composer.busy(true);
    try {
      const settings = this.composer.settings();
      const begun = await api.ask(this.id, { content, files, settings, ...(this.id ? { parent } : {}) });
      this.begin(begun);
      return true;
    } catch (error) {
      this.composer.busy(false);
      this.say(api.said(error));
      return false;
    }
  }

  async again(message) {
    if (this.composer.isBusy) return;
    this.composer.busy(true);
    const settings = this.composer.settings();
    if (!settings.temperature) settings.temperature = 0.7; // at 0 the same answer would come
    try {
      this.begin(await api.again(this.id, message.parent, settings));
    } catch (error) {
      this.composer.busy(false);
      this.say(api.said(error));
    }
  }

  edit(message, content) {
    return this.send({ content, files: [] }, message.parent);
  }

  begin(begun) {
    const fresh = this.id !== begun.id;
    this.id = begun.id;
    this.title = begun.title;
    this.take(begun.messages);
    this.leaf = begun.messages.at(-1).id;
    if (fresh) history.pushState(null, '', `#/c/${this.id}`);
    this.entitle(this.title);
    this.sidebar.mark(this.id);
    this.sidebar.refresh();
    this.show();
    this.toEnd();
    this.attach();
  }

  async stop() {
    const last = this.path().at(-1);
    if (last?.state === 'running') await api.stop(this.id, last.id).catch((error) => this.say(api.said(error)));
  }

  // --- answers as they grow ---

  detach() {
    this.attached?.abort();
    this.attached = null;
  }

  async attach() {
    this.detach();
    const message = this.path().at(-1), id = this.id;
    if (message?.state !== 'running') return;
    const listening = new AbortController();
    this.attached = listening;
    find('spoken').textContent = words.thinkingNow;
    try {
      for await (const now of api.events(id, message.id, listening.signal)) {
        if (listening.signal.aborted) return;
        if (this.broken) this.say('');
        this.broken = false;
        this.grow(now);
      }
    } catch (error) {
      if (listening.signal.aborted) return;
      this.broken = true;
      this.say(api.said(error));
      this.composer.busy(false);
      setTimeout(() => { if (this.attached === listening) this.attach(); }, 2000);
      return;
    }
    const done = this.messages.get(message.id);
    find('spoken').textContent = done.content || done.error || words.states[done.state] || words.empty;
    this.sidebar.refresh();
  }

  grow(message) {
    const scroll = find('scroll'), follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
    this.messages.set(message.id, message);
    const path = this.path();
    this.turns.get(message.id)?.update(message, this.siblings(message), path.at(-1)?.id === message.id);
    if (message.state !== 'running') this.composer.busy(false);
    if (follows) this.toEnd();
  }
}
