// The question, its files, and how the answer is asked for.

import { find, icon, iconButton, make } from './dom.js';
import { words } from './i18n.js';

const MOST_BYTES = 1_000_000, MOST_FILES = 8;
const NUMBERS = { temperature: 0, top_p: 1, top_k: 0, min_p: 0, max_tokens: null, seed: null };

export class Composer {
  constructor(send, stop) {
    this.send = send;
    this.files = [];
    this.isBusy = false;
    const form = find('ask'), question = find('question');
    form.addEventListener('submit', (event) => { event.preventDefault(); this.submit(); });
    question.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    question.addEventListener('input', () => this.fit());
    find('stop').addEventListener('click', stop);
    find('attach').addEventListener('click', () => find('picker').click());
    find('picker').addEventListener('change', () => { this.take([...find('picker').files]); find('picker').value = ''; });
    find('tune').addEventListener('click', () => find('settings').showModal());
    find('reset').addEventListener('click', () => { localStorage.removeItem('settings'); this.restore(); });
    find('settings').addEventListener('close', () => this.keep());
    find('thinking').addEventListener('change', () => this.keep());
    this.dropping();
    this.restore();
    this.fit();
  }

  async submit() {
    const content = find('question').value.trim(), files = this.files;
    if (this.isBusy || (!content && !files.length)) return;
    find('question').value = '';
    this.files = [];
    this.changed();
    if (await this.send({ content, files })) return;
    if (!find('question').value) find('question').value = content; // it was refused: nothing is lost
    this.files = files;
    this.changed();
  }

  busy(now) {
    const had = document.activeElement === find('send') || document.activeElement === find('stop');
    this.isBusy = now;
    find('send').hidden = now;
    find('stop').hidden = !now;
    if (had) find(now ? 'stop' : 'question').focus({ preventScroll: true });
    this.fit();
  }

  fit() {
    const question = find('question');
    question.style.height = 'auto';
    question.style.height = `${question.scrollHeight}px`;
    find('send').disabled = !question.value.trim() && !this.files.length;
  }

  // --- files ---

  async take(list) {
    for (const file of list) {
      const trouble = this.files.length >= MOST_FILES ? words.tooMany : file.size > MOST_BYTES ? words.tooLarge(file.name) : null;
      const text = trouble ? null : await readText(file);
      if (text === null) find('notice').textContent = trouble ?? words.notText(file.name);
      else this.files = [...this.files, { name: file.name.slice(-200), text }];
    }
    this.changed();
    find('question').focus();
  }

  changed() {
    const chips = this.files.map((file) => make('span', { className: 'file' }, icon('file'), file.name,
      iconButton('close', words.remove(file.name), () => { this.files = this.files.filter((one) => one !== file); this.changed(); find('question').focus(); })));
    find('files').replaceChildren(...chips);
    this.fit();
  }

  dropping() {
    const chat = find('chat'), holds = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
    let depth = 0;
    chat.addEventListener('dragenter', (event) => { if (holds(event)) { depth += 1; find('drop').hidden = false; } });
    chat.addEventListener('dragleave', () => { depth = Math.max(0, depth - 1); find('drop').hidden = depth === 0; });
    addEventListener('dragover', (event) => { if (holds(event)) event.preventDefault(); });
    addEventListener('drop', (event) => {
      if (!holds(event)) return;
      event.preventDefault();
      depth = 0;
      find('drop').hidden = true;
      if (!chat.hidden) this.take([...event.dataTransfer.files]);
    });
  }

  // --- settings ---

  settings() {
    const made = { thinking: find('thinking').value, system: find('system').value };
    for (const [name, usual] of Object.entries(NUMBERS)) {
      const value = find(name).validity.valid ? find(name).valueAsNumber : NaN;
      if (!Number.isNaN(value)) made[name] = value;
      else if (usual !== null) made[name] = usual;
    }
    return made;
  }

  keep() {
    localStorage.setItem('settings', JSON.stringify(this.settings()));
    this.mark();
  }

  restore() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem('settings')) ?? {};
    } catch {
      localStorage.removeItem('settings'); // written by another version
    }
    for (const [name, usual] of Object.entries(NUMBERS)) find(name).value = kept[name] ?? usual ?? '';
    find('thinking').value = ['enabled', 'disabled'].includes(kept.thinking) ? kept.thinking : 'auto';
    find('system').value = kept.system ?? '';
    this.mark();
  }

  // Shows that the settings are not the usual ones.
  mark() {
    const now = this.settings();
    const usual = !now.system && Object.entries(NUMBERS).every(([name, value]) => (now[name] ?? null) === value);
    find('tune').classList.toggle('changed', !usual);
  }
}

async function readText(file) {
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(await file.arrayBuffer());
    return text.includes('\0') ? null : text;
  } catch {
    return null;
  }
}
