// Words and numbers in the browser's language: German where it is German, otherwise English.

import { icon } from './dom.js';
import { DE } from './words_de.js';
import { EN } from './words_en.js';

export const LANGUAGE = navigator.language.toLowerCase().startsWith('de') ? 'de' : 'en';
export const words = LANGUAGE === 'de' ? DE : EN;
export const share = new Intl.NumberFormat(LANGUAGE, { style: 'percent', maximumFractionDigits: 0 });
export const tenths = new Intl.NumberFormat(LANGUAGE, { style: 'percent', minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const number = new Intl.NumberFormat(LANGUAGE, { maximumFractionDigits: 1 });
export const precise = new Intl.NumberFormat(LANGUAGE, { maximumSignificantDigits: 2 });
export const short = new Intl.NumberFormat(LANGUAGE, { notation: 'compact', maximumFractionDigits: 1 });

// Fills in every element that names its words or its icon: data-text, data-placeholder, data-label, data-icon.
export function translate(root) {
  document.documentElement.lang = LANGUAGE;
  for (const element of root.querySelectorAll('[data-text]')) element.textContent = words[element.dataset.text];
  for (const element of root.querySelectorAll('[data-placeholder]')) element.placeholder = words[element.dataset.placeholder];
  for (const element of root.querySelectorAll('[data-label]')) {
    element.setAttribute('aria-label', words[element.dataset.label]);
    if (element.matches('button')) element.title = words[element.dataset.label];
  }
  for (const element of root.querySelectorAll('[data-icon]')) element.prepend(icon(element.dataset.icon));
}

export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds)), hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60, rest = String(whole % 60).padStart(2, '0');
  return hours ? `${hours}:${String(minutes).padStart(2, '0')}:${rest}` : `${minutes}:${rest}`;
}
