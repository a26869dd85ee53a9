"""How the panel looks. Colours come from JupyterLab's theme where it defines them; the fallbacks read on light and on dark."""

from __future__ import annotations

STYLE = """<style>
.airllm-panel { max-width: 960px; box-sizing: border-box; padding: 12px 16px; border-radius: 6px;
  border: 1px solid var(--jp-border-color2, rgba(128, 128, 128, .5));
  font-family: var(--jp-ui-font-family, system-ui, sans-serif); }
.airllm-panel .airllm { max-width: none; }
.airllm-head { display: flex; flex-wrap: wrap; column-gap: 1em; justify-content: space-between; line-height: 1.5;
  font-size: 13px; padding-bottom: 6px; border-bottom: 1px solid var(--jp-border-color2, rgba(128, 128, 128, .5)); }
.airllm-row { flex-wrap: wrap; align-items: baseline; overflow: visible; margin: 2px 0; }
.airllm-panel .widget-label { text-align: left; }
.airllm-label { font-size: 13px; line-height: 28px; margin: 0 6px 0 2px; }
.airllm-why { font-size: 12px; line-height: 1.45; opacity: .8; }
.airllm-problem { overflow-wrap: anywhere; font-size: 13px; line-height: 1.5; padding: 2px 8px; margin: 2px 0;
  border-left: 3px solid var(--jp-error-color1, #d32f2f); }
.airllm-problem pre { overflow: auto; max-height: 16em; font-size: 12px; }
.airllm-panel .airllm-plan { display: grid; grid-template-columns: max-content 1fr; gap: 0 12px; margin: 4px 0 6px;
  font-size: 13px; line-height: 1.55; font-variant-numeric: tabular-nums; }
.airllm-panel .airllm-plan dt, .airllm-panel .airllm-plan dd { margin: 0; padding: 0; float: none; width: auto; }
.airllm-panel .airllm-plan dt { opacity: .75; font-weight: 400; }
.airllm-fold .widget-toggle-button { text-align: left; font-weight: 600; }
.airllm-fold .widget-html-content { min-width: 0; }
.airllm-fold img { max-width: 100%; }
.airllm-turn { font-size: 14px; line-height: 1.5; margin: 6px 0; padding: 6px 10px; border-radius: 6px; }
.airllm-turn > b { display: block; font-size: 12px; font-weight: 600; opacity: .75; }
.airllm-turn > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.airllm-turn .airllm-turn-note { font-size: 12px; opacity: .75; margin-top: 2px; }
.airllm-user { background: rgba(128, 128, 128, .14); margin-left: 12%; }
.airllm-assistant { border-left: 3px solid var(--jp-brand-color1, #1976d2); border-radius: 0; margin-right: 6%; }
</style>"""
