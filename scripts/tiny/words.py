"""The words and facts of the tiny model's world, English and Chinese side by side. Import it; there is nothing to run.

Every table is text, one row a line, cells parted by `|`, so that a reader checks a fact without reading code. Facts
that have two good answers (a country on two continents, a word with two opposites) are left out: a question made from
these tables has exactly one right answer.
"""


def table(text: str) -> list[tuple[str, ...]]:
    """Rows of cells from lines of `a | b | c`."""
    return [tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines()]


COUNTRIES = table("""
France | Paris | Europe | 法国 | 巴黎 | 欧洲
Germany | Berlin | Europe | 德国 | 柏林 | 欧洲
Italy | Rome | Europe | 意大利 | 罗马 | 欧洲
Spain | Madrid | Europe | 西班牙 | 马德里 | 欧洲
Portugal | Lisbon | Europe | 葡萄牙 | 里斯本 | 欧洲
Greece | Athens | Europe | 希腊 | 雅典 | 欧洲
Austria | Vienna | Europe | 奥地利 | 维也纳 | 欧洲
Hungary | Budapest | Europe | 匈牙利 | 布达佩斯 | 欧洲
Poland | Warsaw | Europe | 波兰 | 华沙 | 欧洲
Sweden | Stockholm | Europe | 瑞典 | 斯德哥尔摩 | 欧洲
Norway | Oslo | Europe | 挪威 | 奥斯陆 | 欧洲
Finland | Helsinki | Europe | 芬兰 | 赫尔辛基 | 欧洲
Denmark | Copenhagen | Europe | 丹麦 | 哥本哈根 | 欧洲
Ireland | Dublin | Europe | 爱尔兰 | 都柏林 | 欧洲
Belgium | Brussels | Europe | 比利时 | 布鲁塞尔 | 欧洲
Ukraine | Kyiv | Europe | 乌克兰 | 基辅 | 欧洲
Romania | Bucharest | Europe | 罗马尼亚 | 布加勒斯特 | 欧洲
Bulgaria | Sofia | Europe | 保加利亚 | 索非亚 | 欧洲
Serbia | Belgrade | Europe | 塞尔维亚 | 贝尔格莱德 | 欧洲
Croatia | Zagreb | Europe | 克罗地亚 | 萨格勒布 | 欧洲
Iceland | Reykjavik | Europe | 冰岛 | 雷克雅未克 | 欧洲
the United Kingdom | London | Europe | 英国 | 伦敦 | 欧洲
China | Beijing | Asia | 中国 | 北京 | 亚洲
Japan | Tokyo | Asia | 日本 | 东京 | 亚洲
India | New Delhi | Asia | 印度 | 新德里 | 亚洲
Thailand | Bangkok | Asia | 泰国 | 曼谷 | 亚洲
Vietnam | Hanoi | Asia | 越南 | 河内 | 亚洲
Iran | Tehran | Asia | 伊朗 | 德黑兰 | 亚洲
Iraq | Baghdad | Asia | 伊拉克 | 巴格达 | 亚洲
Nepal | Kathmandu | Asia | 尼泊尔 | 加德满都 | 亚洲
Pakistan | Islamabad | Asia | 巴基斯坦 | 伊斯兰堡 | 亚洲
Bangladesh | Dhaka | Asia | 孟加拉国 | 达卡 | 亚洲
Malaysia | Kuala Lumpur | Asia | 马来西亚 | 吉隆坡 | 亚洲
South Korea | Seoul | Asia | 韩国 | 首尔 | 亚洲
Mongolia | Ulaanbaatar | Asia | 蒙古 | 乌兰巴托 | 亚洲
Cambodia | Phnom Penh | Asia | 柬埔寨 | 金边 | 亚洲
Laos | Vientiane | Asia | 老挝 | 万象 | 亚洲
Jordan | Amman | Asia | 约旦 | 安曼 | 亚洲
Lebanon | Beirut | Asia | 黎巴嫩 | 贝鲁特 | 亚洲
Syria | Damascus | Asia | 叙利亚 | 大马士革 | 亚洲
Qatar | Doha | Asia | 卡塔尔 | 多哈 | 亚洲
Egypt | Cairo | Africa | 埃及 | 开罗 | 非洲
Kenya | Nairobi | Africa | 肯尼亚 | 内罗毕 | 非洲
Morocco | Rabat | Africa | 摩洛哥 | 拉巴特 | 非洲
Algeria | Algiers | Africa | 阿尔及利亚 | 阿尔及尔 | 非洲
Tunisia | Tunis | Africa | 突尼斯 | 突尼斯市 | 非洲
Ghana | Accra | Africa | 加纳 | 阿克拉 | 非洲
Ethiopia | Addis Ababa | Africa | 埃塞俄比亚 | 亚的斯亚贝巴 | 非洲
Uganda | Kampala | Africa | 乌干达 | 坎帕拉 | 非洲
Senegal | Dakar | Africa | 塞内加尔 | 达喀尔 | 非洲
Sudan | Khartoum | Africa | 苏丹 | 喀土穆 | 非洲
Canada | Ottawa | North America | 加拿大 | 渥太华 | 北美洲
the United States | Washington | North America | 美国 | 华盛顿 | 北美洲
Mexico | Mexico City | North America | 墨西哥 | 墨西哥城 | 北美洲
Cuba | Havana | North America | 古巴 | 哈瓦那 | 北美洲
Panama | Panama City | North America | 巴拿马 | 巴拿马城 | 北美洲
Brazil | Brasilia | South America | 巴西 | 巴西利亚 | 南美洲
Argentina | Buenos Aires | South America | 阿根廷 | 布宜诺斯艾利斯 | 南美洲
Chile | Santiago | South America | 智利 | 圣地亚哥 | 南美洲
Peru | Lima | South America | 秘鲁 | 利马 | 南美洲
Colombia | Bogota | South America | 哥伦比亚 | 波哥大 | 南美洲
Ecuador | Quito | South America | 厄瓜多尔 | 基多 | 南美洲
Venezuela | Caracas | South America | 委内瑞拉 | 加拉加斯 | 南美洲
Uruguay | Montevideo | South America | 乌拉圭 | 蒙得维的亚 | 南美洲
Australia | Canberra | Oceania | 澳大利亚 | 堪培拉 | 大洋洲
New Zealand | Wellington | Oceania | 新西兰 | 惠灵顿 | 大洋洲
""")

COLOURS = table("""
grass | green | 草 | 绿色
a leaf | green | 叶子 | 绿色
a frog | green | 青蛙 | 绿色
a cucumber | green | 黄瓜 | 绿色
the sky | blue | 天空 | 蓝色
the sea | blue | 大海 | 蓝色
snow | white | 雪 | 白色
milk | white | 牛奶 | 白色
salt | white | 盐 | 白色
a swan | white | 天鹅 | 白色
blood | red | 血 | 红色
a strawberry | red | 草莓 | 红色
a tomato | red | 西红柿 | 红色
a cherry | red | 樱桃 | 红色
coal | black | 煤 | 黑色
a crow | black | 乌鸦 | 黑色
the night | black | 夜晚 | 黑色
a banana | yellow | 香蕉 | 黄色
a lemon | yellow | 柠檬 | 黄色
the sun | yellow | 太阳 | 黄色
a chick | yellow | 小鸡 | 黄色
a carrot | orange | 胡萝卜 | 橙色
a pumpkin | orange | 南瓜 | 橙色
chocolate | brown | 巧克力 | 棕色
a bear | brown | 熊 | 棕色
an elephant | grey | 大象 | 灰色
a mouse | grey | 老鼠 | 灰色
a flamingo | pink | 火烈鸟 | 粉色
a peach | pink | 桃子 | 粉色
an eggplant | purple | 茄子 | 紫色
a grape | purple | 葡萄 | 紫色
""")

OPPOSITES = table("""
big | small | 大 | 小
hot | cold | 热 | 冷
up | down | 上 | 下
left | right | 左 | 右
open | closed | 开 | 关
day | night | 白天 | 黑夜
long | short | 长 | 短
fast | slow | 快 | 慢
rich | poor | 富 | 穷
happy | sad | 高兴 | 难过
old | new | 旧 | 新
bright | dark | 亮 | 暗
strong | weak | 强 | 弱
clean | dirty | 干净 | 脏
wet | dry | 湿 | 干
full | empty | 满 | 空
early | late | 早 | 晚
near | far | 近 | 远
high | low | 高 | 低
wide | narrow | 宽 | 窄
thick | thin | 厚 | 薄
hard | soft | 硬 | 软
loud | quiet | 吵闹 | 安静
deep | shallow | 深 | 浅
good | bad | 好 | 坏
true | false | 真 | 假
first | last | 第一 | 最后
black | white | 黑 | 白
win | lose | 赢 | 输
buy | sell | 买 | 卖
push | pull | 推 | 拉
give | take | 给 | 拿
laugh | cry | 笑 | 哭
start | stop | 开始 | 停止
love | hate | 爱 | 恨
east | west | 东 | 西
north | south | 北 | 南
above | below | 上面 | 下面
inside | outside | 里面 | 外面
more | less | 多 | 少
sweet | bitter | 甜 | 苦
brave | afraid | 勇敢 | 害怕
war | peace | 战争 | 和平
safe | dangerous | 安全 | 危险
easy | difficult | 容易 | 困难
cheap | expensive | 便宜 | 贵
always | never | 总是 | 从不
""")

BABIES = table("""
a dog | puppy | 狗 | 小狗
a cat | kitten | 猫 | 小猫
a cow | calf | 牛 | 小牛
a horse | foal | 马 | 小马
a sheep | lamb | 羊 | 小羊
a pig | piglet | 猪 | 小猪
a hen | chick | 母鸡 | 小鸡
a duck | duckling | 鸭子 | 小鸭
a goose | gosling | 鹅 | 小鹅
a bear | cub | 熊 | 小熊
a frog | tadpole | 青蛙 | 蝌蚪
a butterfly | caterpillar | 蝴蝶 | 毛毛虫
a deer | fawn | 鹿 | 小鹿
a kangaroo | joey | 袋鼠 | 小袋鼠
a swan | cygnet | 天鹅 | 小天鹅
an owl | owlet | 猫头鹰 | 小猫头鹰
""")

SOUNDS = table("""
a dog | woof | 狗 | 汪汪
a cat | meow | 猫 | 喵喵
a cow | moo | 牛 | 哞哞
a sheep | baa | 羊 | 咩咩
a duck | quack | 鸭子 | 嘎嘎
a lion | roar | 狮子 | 吼吼
a pig | oink | 猪 | 哼哼
a bee | buzz | 蜜蜂 | 嗡嗡
a frog | croak | 青蛙 | 呱呱
a bird | tweet | 小鸟 | 叽叽
a wolf | howl | 狼 | 嗷嗷
a hen | cluck | 母鸡 | 咯咯
""")

LEGS = table("""
a dog | 4 | 狗 | 4
a cat | 4 | 猫 | 4
a cow | 4 | 牛 | 4
a horse | 4 | 马 | 4
a sheep | 4 | 羊 | 4
a pig | 4 | 猪 | 4
a lion | 4 | 狮子 | 4
a tiger | 4 | 老虎 | 4
an elephant | 4 | 大象 | 4
a rabbit | 4 | 兔子 | 4
a hen | 2 | 母鸡 | 2
a duck | 2 | 鸭子 | 2
a goose | 2 | 鹅 | 2
an owl | 2 | 猫头鹰 | 2
a crow | 2 | 乌鸦 | 2
an ant | 6 | 蚂蚁 | 6
a bee | 6 | 蜜蜂 | 6
a butterfly | 6 | 蝴蝶 | 6
a beetle | 6 | 甲虫 | 6
a spider | 8 | 蜘蛛 | 8
a scorpion | 8 | 蝎子 | 8
a crab | 10 | 螃蟹 | 10
a snake | 0 | 蛇 | 0
a fish | 0 | 鱼 | 0
a worm | 0 | 蚯蚓 | 0
""")

KINDS = table("""
an apple | fruit | 苹果 | 水果
a banana | fruit | 香蕉 | 水果
a pear | fruit | 梨 | 水果
a peach | fruit | 桃子 | 水果
a lemon | fruit | 柠檬 | 水果
a carrot | vegetable | 胡萝卜 | 蔬菜
a potato | vegetable | 土豆 | 蔬菜
an onion | vegetable | 洋葱 | 蔬菜
a cabbage | vegetable | 白菜 | 蔬菜
a dog | animal | 狗 | 动物
a cat | animal | 猫 | 动物
a horse | animal | 马 | 动物
a tiger | animal | 老虎 | 动物
a rabbit | animal | 兔子 | 动物
iron | metal | 铁 | 金属
copper | metal | 铜 | 金属
gold | metal | 金 | 金属
silver | metal | 银 | 金属
red | colour | 红色 | 颜色
blue | colour | 蓝色 | 颜色
green | colour | 绿色 | 颜色
yellow | colour | 黄色 | 颜色
a hammer | tool | 锤子 | 工具
a saw | tool | 锯子 | 工具
a spade | tool | 铲子 | 工具
a rose | flower | 玫瑰 | 花
a tulip | flower | 郁金香 | 花
a lily | flower | 百合 | 花
a car | vehicle | 汽车 | 交通工具
a bus | vehicle | 公共汽车 | 交通工具
a train | vehicle | 火车 | 交通工具
a piano | instrument | 钢琴 | 乐器
a guitar | instrument | 吉他 | 乐器
a violin | instrument | 小提琴 | 乐器
football | sport | 足球 | 运动
tennis | sport | 网球 | 运动
swimming | sport | 游泳 | 运动
a table | furniture | 桌子 | 家具
a chair | furniture | 椅子 | 家具
a bed | furniture | 床 | 家具
a coat | clothing | 外套 | 衣服
a shirt | clothing | 衬衫 | 衣服
a hat | clothing | 帽子 | 衣服
""")

VERBS = table("""
think | 想
answer | 回答
ask | 问
read | 读
write | 写
run | 跑
eat | 吃
drink | 喝
sleep | 睡觉
sing | 唱歌
swim | 游
walk | 走
""")

DAYS = table("""
Monday | 星期一
Tuesday | 星期二
Wednesday | 星期三
Thursday | 星期四
Friday | 星期五
Saturday | 星期六
Sunday | 星期日
""")

MONTHS = table("""
January | 一月
February | 二月
March | 三月
April | 四月
May | 五月
June | 六月
July | 七月
August | 八月
September | 九月
October | 十月
November | 十一月
December | 十二月
""")

SEASONS = table("""
spring | 春天
summer | 夏天
autumn | 秋天
winter | 冬天
""")

NAMES = table("""
Tom | 小明
Anna | 小红
Ben | 小华
Mary | 小丽
Paul | 小刚
Lucy | 小芳
Jack | 小军
Emma | 小美
""")

PLACES = table("""
garden | 花园
house | 房子
school | 学校
kitchen | 厨房
forest | 森林
street | 街道
shop | 商店
park | 公园
""")


def bare(noun: str) -> str:
    """The noun without its article: `an apple` gives `apple`."""
    return noun.split(" ", 1)[1] if noun.startswith(("a ", "an ", "the ")) else noun


def dictionary() -> list[tuple[str, str]]:
    """(English, Chinese) pairs, each word once, for translating, copying and changing case."""
    pairs = [(bare(row[0]), row[2]) for row in COLOURS + KINDS + LEGS] + [(row[0], row[2]) for row in OPPOSITES]
    pairs += [(row[1], row[3]) for row in COLOURS] + list(VERBS + DAYS + MONTHS + SEASONS)
    once: dict[str, str] = {}
    seen: set[str] = set()
    for english, chinese in pairs:
        if english not in once and chinese not in seen:
            once[english] = chinese
            seen.add(chinese)
    return list(once.items())


WORDS = dictionary()
