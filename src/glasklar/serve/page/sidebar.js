// The list of conversations: found, opened, renamed, exported, deleted.

import * as api from './api.js';
import { find, icon, make } from './dom.js';
import { LANGUAGE, words } from './i18n.js';

const DAY = 86_400_000;
const narrow = matchMedia('(max-width: 52rem)');

export class Sidebar {
  constructor() {
    this.items = [];
    this.current = null;
    find('menu').addEventListener('click', () => this.toggle());
    find('fold').addEventListener('click', () => { this.toggle(); find('menu').focus(); });
    find('scrim').addEventListener('click', () => this.close());
    let wait;
    find('search').addEventListener('input', () => { clearTimeout(wait); wait = setTimeout(() => this.refresh(), 150); });
    addEventListener('keydown', (event) => {
      if (event.key !== 'Escape') return;
      if (this.menu) this.closeMenu(true);
      else if (document.body.classList.contains('list-open')) { this.close(); find('menu').focus(); }
    });
    addEventListener('click', (event) => { if (this.menu && !this.menu.box.contains(event.target)) this.closeMenu(); });
    this.say();
  }

  // On a narrow screen the list lies over the page, on a wide one it stands beside it.
  toggle() {
    document.body.classList.toggle(narrow.matches ? 'list-open' : 'list-folded');
    this.say();
    if (narrow.matches && document.body.classList.contains('list-open')) find('fold').focus();
  }

  close() {
    document.body.classList.remove('list-open');
    this.say();
  }

  say() {
    const open = narrow.matches ? document.body.classList.contains('list-open') : !document.body.classList.contains('list-folded');
    find('menu').setAttribute('aria-expanded', String(open));
    find('scrim').hidden = !(narrow.matches && open);
  }

  async refresh() {
    const wanted = find('search').value;
    const found = await api.conversations(wanted).catch(() => null);
    if (!found || wanted !== find('search').value) return;
    this.items = found;
    this.show();
  }

  mark(id) {
    this.current = id;
    for (const link of find('list').querySelectorAll('a')) this.markLink(link);
  }

  markLink(link) {
    if (link.dataset.id === this.current) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }

  show() {
    const groups = new Map();
    for (const item of this.items) {
      const name = dayOf(item.updated);
      groups.set(name, [...(groups.get(name) ?? []), item]);
    }
    const shown = [...groups].flatMap(([name, items]) => [
      make('h3', { textContent: name }), make('ul', {}, ...items.map((item) => this.row(item))),
    ]);
    const none = find('search').value.trim() ? words.nothingFound : words.noneYet;
    find('list').replaceChildren(...(shown.length ? shown : [make('p', { className: 'muted', textContent: none })]));
  }

  row(item) {
    const link = make('a', { href: `#/c/${item.id}`, textContent: item.title, title: item.title });
    link.dataset.id = item.id;
    this.markLink(link);
    const more = make('button', { type: 'button', className: 'tool', 'aria-label': words.more(item.title), 'aria-haspopup': 'menu', 'aria-expanded': 'false' }, icon('more'));
    const row = make('li', {}, link, more);
    more.addEventListener('click', (event) => { event.stopPropagation(); this.openMenu(row, more, item); });
    return row;
  }

  openMenu(row, button, item) {
    const again = this.menu?.button === button;
    this.closeMenu();
    if (again) return;
    const entry = (name, sign, act) => make('button', { type: 'button', role: 'menuitem', onclick: () => { this.closeMenu(); act(); } }, icon(sign), name);
    const file = (name, form) => make('a', { role: 'menuitem', href: api.exported(item.id, form), download: '', onclick: () => this.closeMenu() }, icon('save'), name);
    const box = make('div', { className: 'menu', role: 'menu' },
      entry(words.rename, 'edit', () => this.rename(row, item)), file(words.exportMd, 'md'), file(words.exportJson, 'json'),
      entry(words.delete, 'trash', () => this.remove(item)));
    box.addEventListener('keydown', (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const entries = [...box.children];
      entries.at((entries.indexOf(document.activeElement) + step) % entries.length).focus();
    });
    row.append(box);
    button.setAttribute('aria-expanded', 'true');
    this.menu = { box, button };
    if (box.getBoundingClientRect().bottom > innerHeight) box.classList.add('up');
    box.firstChild.focus();
  }

  closeMenu(back = false) {
    if (!this.menu) return;
    const { box, button } = this.menu;
    this.menu = null;
    box.remove();
    button.setAttribute('aria-expanded', 'false');
    if (back) button.focus();
  }

  rename(row, item) {
    const field = make('input', { className: 'rename', value: item.title, maxLength: 200, 'aria-label': words.rename });
    const end = async (keep) => {
      field.onblur = null;
      const title = field.value.trim();
      if (keep && title && title !== item.title) await api.change(item.id, { title }).catch(() => null);
      await this.refresh();
      if (item.id === this.current) this.renamed?.(this.items.find((one) => one.id === item.id)?.title ?? title);
      find('list').querySelector(`a[href="#/c/${item.id}"]`)?.focus();
    };
    field.addEventListener('keydown', (event) => {
      if (event.key === 'Enter') end(true);
      if (event.key === 'Escape') { event.stopPropagation(); end(false); }
    });
    field.onblur = () => end(true);
    row.replaceChildren(field);
    field.select();
  }

  remove(item) {
    const dialog = find('confirm');
    find('confirm-text').textContent = words.confirmDelete(item.title);
    dialog.returnValue = 'no';
    dialog.onclose = async () => {
      if (dialog.returnValue !== 'yes') return;
      await api.remove(item.id).catch(() => null);
      if (item.id === this.current) location.hash = '#/';
      this.refresh();
    };
    dialog.showModal();
  }
}

function dayOf(seconds) {
  const midnight = new Date().setHours(0, 0, 0, 0), then = seconds * 1000;
  if (then >= midnight) return words.today;
  if (then >= midnight - DAY) return words.yesterday;
  const month = new Intl.DateTimeFormat(LANGUAGE, { month: 'long', year: 'numeric' });
  return then >= midnight - 7 * DAY ? words.earlier : month.format(then);
}
