"""训练器的各间屋子，见 docs/design.md；只从根目录导入 utils。"""
